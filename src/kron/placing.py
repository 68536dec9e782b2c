"""The seam through which stacks are spread over a mesh: `kronmesh.parallel.Placement` on one side, `Local` here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array


class Layout(Protocol):
  """How matrices are laid into stacks, as `Local` asks for it: `stacks.Layout`, which stands above this module."""

  def gather(self, values: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]: ...

  def padded(self, wholes: Mapping[str, Array]) -> dict[str, Array]: ...

  def unpadded(self, stacks: Mapping[str, Array]) -> dict[str, Array]: ...


class Placement(Protocol):
  """Where stacks live and how they get there. Stacks are dictionaries by name, see `stacks.Layout`.

  An object rather than several arguments, as optax.inject_hyperparams takes numbers and functions for hyper-parameters.

  owners, local_inverses, row_sharded: how factors are dealt, see `dealing.Deal`.
  axes: the mesh axes that number the owners, for collectives inside of `over_stacks`.
  """

  @property
  def owners(self) -> int: ...

  @property
  def local_inverses(self) -> bool: ...

  @property
  def row_sharded(self) -> bool: ...

  @property
  def axes(self) -> tuple[str, ...]: ...

  def shards(self, examples: int) -> int:
    """Into how many shards a batch's statistics are divided."""
    ...

  def along(self, shards: int) -> tuple[str, ...]:
    """The mesh axes of so many shards."""
    ...

  def place(self, x: Array, axis: int, divided: bool) -> Array:
    """Says where rows lie: the batch's, with examples along this axis; or divided, with shards along it."""
    ...

  def over_shards(self, fn: Callable, shards: int) -> Callable:
    """Makes a function of arrays that lead with shards into one whose shards run where they lie, each for itself."""
    ...

  def over_stacks(self, fn: Callable) -> Callable:
    """Makes a function of trees of arrays that lead with the owner axis into one that runs owner by owner."""
    ...

  def at_owners(self, fn: Callable, layout: Layout) -> Callable:
    """Makes a function of (stacks that `share` returned, trees that lead with the owner axis) into one that runs owner by
    owner, its results (which lead with the owner axis) on every device."""
    ...

  def collect(self, shares: Mapping[str, Mapping[str, Array]], layout: Layout) -> dict[str, Array]:
    """Stacks of factors, each with its owner, from what shards add: (shards, slots, n, n) by block and factor."""
    ...

  def share(self, stacks: Mapping[str, Array], layout: Layout, symmetric: bool = True) -> dict[str, Array]:
    """Matrices from their owners to those that hold them: (matrix, n, n) on every device, or stacks with their owners."""
    ...

  def own(self, held: Mapping[str, Array], layout: Layout) -> dict[str, Array]:
    """The inverse of `share`: stacks, each with its owner. Padding holds anything."""
    ...

  def replicate(self, values: Any) -> Any:
    """The same values on every device."""
    ...


class Local(NamedTuple):
  """The placement of a program that knows of no mesh."""

  owners: int = 1
  local_inverses: bool = False
  row_sharded: bool = False
  axes: tuple[str, ...] = ()

  def shards(self, examples: int) -> int:
    return 1

  def along(self, shards: int) -> tuple[str, ...]:
    return ()

  def place(self, x: Array, axis: int, divided: bool) -> Array:
    return x

  def over_shards(self, fn: Callable, shards: int) -> Callable:
    return fn

  def over_stacks(self, fn: Callable) -> Callable:
    return fn

  def at_owners(self, fn: Callable, layout: Layout) -> Callable:
    return fn

  def collect(self, shares: Mapping[str, Mapping[str, Array]], layout: Layout) -> dict[str, Array]:
    return layout.gather({block: {f: x.sum(0) for f, x in own.items()} for block, own in shares.items()})

  def share(self, stacks: Mapping[str, Array], layout: Layout, symmetric: bool = True) -> dict[str, Array]:
    return layout.unpadded(stacks)

  def own(self, held: Mapping[str, Array], layout: Layout) -> dict[str, Array]:
    return layout.padded(held)

  def replicate(self, values: Any) -> Any:
    return values
