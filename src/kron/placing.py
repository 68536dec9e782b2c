"""The interface for spreading stacks over a mesh: `kronmesh.parallel.Placement` implements it, and `Local` here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array


@runtime_checkable
class Layout(Protocol):
  """The layout of matrices in stacks that `Local` needs; `stacks.Layout`, in a higher layer, implements it."""

  def gather(self, values: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]: ...

  def padded(self, wholes: Mapping[str, Array]) -> dict[str, Array]: ...

  def unpadded(self, stacks: Mapping[str, Array]) -> dict[str, Array]: ...


@runtime_checkable
class Placement(Protocol):
  """The location of stacks, and the ways to move them. Stacks are dictionaries by name, see `stacks.Layout`.

  It is one object because optax.inject_hyperparams would treat separate numbers and functions as hyper-parameters.

  owners, local_inverses, row_sharded: how factors are dealt to owners, see `dealing.Deal`.
  axes: the mesh axes that number the owners, for collectives inside `over_stacks`.
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
    """Returns the number of shards into which a batch's statistics are divided."""
    ...

  def along(self, shards: int) -> tuple[str, ...]:
    """Returns the mesh axes along which this number of shards lies."""
    ...

  def place(self, x: Array, axis: int, divided: bool) -> Array:
    """Constrains the sharding of rows.

    They are sharded like the batch, with examples along `axis`; or, if `divided`, with shards along `axis`.
    """
    ...

  def over_shards(self, fn: Callable, shards: int) -> Callable:
    """Wraps a function of arrays that lead with shards so that each shard runs separately, where it lies."""
    ...

  def over_stacks(self, fn: Callable) -> Callable:
    """Wraps a function of trees of arrays that lead with the owner axis so that it runs owner by owner."""
    ...

  def at_owners(self, fn: Callable, layout: Layout) -> Callable:
    """Wraps a function so that it runs owner by owner and every device gets its results.

    It takes stacks that `share` returned and trees that lead with the owner axis; its results lead with that axis."""
    ...

  def collect(self, shares: Mapping[str, Mapping[str, Array]], layout: Layout) -> dict[str, Array]:
    """Adds up the shards' sums, (shards, slots, n, n) by block and factor, into stacks of factors at their owners."""
    ...

  def share(self, stacks: Mapping[str, Array], layout: Layout, symmetric: bool = True) -> dict[str, Array]:
    """Sends matrices from their owners to the devices that hold them.

    Returns (matrix, n, n) on every device, or stacks with their owners.
    """
    ...

  def own(self, held: Mapping[str, Array], layout: Layout) -> dict[str, Array]:
    """Reverses `share`: returns stacks, each with its owner. Padding slots may hold any values."""
    ...

  def replicate(self, values: Any) -> Any:
    """Places the same values on every device."""
    ...


class Local(NamedTuple):
  """The placement for a program without a mesh."""

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
    return layout.gather(
      {block: {f: x.sum(0) for f, x in shares_of_block.items()} for block, shares_of_block in shares.items()}
    )

  def share(self, stacks: Mapping[str, Array], layout: Layout, symmetric: bool = True) -> dict[str, Array]:
    return layout.unpadded(stacks)

  def own(self, held: Mapping[str, Array], layout: Layout) -> dict[str, Array]:
    return layout.padded(held)

  def replicate(self, values: Any) -> Any:
    return values
