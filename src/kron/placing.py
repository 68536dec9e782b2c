"""The interface for spreading stacks over a mesh: `kronmesh.parallel.Placement` implements it, and `Local` here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Shaped


@runtime_checkable
class Layout(Protocol):
  """The layout of matrices in stacks that `Local` needs; `stacks.Layout`, in a higher layer, implements it."""

  def gather(self, values: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]: ...

  def padded(self, wholes: Mapping[str, Array]) -> dict[str, Array]: ...

  def unpadded(self, stacks: Mapping[str, Array]) -> dict[str, Array]: ...


@runtime_checkable
class Placement(Protocol):
  """Describes where stacks lie and how they move. Stacks are dictionaries by name, see `Layout`.

  `parallel.Placement` implements it for a mesh, and `Local` for a program without one. It is one object because
  optax.inject_hyperparams would treat separate numbers and functions as hyper-parameters.
  """

  @property
  def owners(self) -> int:
    """Returns the number of owners, see `Deal`."""
    ...

  @property
  def local_inverses(self) -> bool:
    """Returns whether inverses stay with their owners, see `Deal`."""
    ...

  @property
  def row_sharded(self) -> bool:
    """Returns whether matrices may be split by rows over all owners, see `Deal`."""
    ...

  @property
  def axes(self) -> tuple[str, ...]:
    """Returns the mesh axes that number the owners, for collectives inside `over_stacks`."""
    ...

  def shards(self, examples: int) -> int:
    """Returns the number of shards into which the statistics of a batch of this many `examples` are divided."""
    ...

  def along(self, shards: int) -> tuple[str, ...]:
    """Returns the mesh axes along which this number of `shards` lies."""
    ...

  def place(self, x: Shaped[Array, '...'], axis: int, divided: bool) -> Shaped[Array, '...']:
    """Returns an array with a constraint on the sharding of its rows.

    Args:
      x: the array.
      axis: the axis that counts examples, or shards if `divided`.
      divided: whether the rows are sharded by shards along `axis`; else they are sharded like the batch.
    """
    ...

  def over_shards(self, fn: Callable, shards: int) -> Callable:
    """Returns a version of `fn` that runs each shard separately, where it lies.

    Args:
      fn: a function of arrays that lead with shards.
      shards: the number of shards.
    """
    ...

  def over_stacks(self, fn: Callable) -> Callable:
    """Returns a version of `fn`, a function of trees that lead with the owner axis, that runs owner by owner."""
    ...

  def at_owners(self, fn: Callable, layout: Layout) -> Callable:
    """Returns a version of a function that runs owner by owner and gives its results to every device.

    Args:
      fn: takes stacks that `share` returned and trees that lead with the owner axis; its results lead with that axis.
      layout: the layout of the stacks.
    """
    ...

  def collect(
    self, shares: Mapping[str, Mapping[str, Float[Array, 'shards slots n n']]], layout: Layout
  ) -> dict[str, Float[Array, 'o s r c']]:
    """Returns stacks of factors at their owners, (owners, slots, rows, n) by name, from the sums of all shards.

    Args:
      shares: block -> factor -> (shards, slots, n, n).
      layout: the layout of the stacks.
    """
    ...

  def share(
    self, stacks: Mapping[str, Float[Array, 'o s r n']], layout: Layout, symmetric: bool = True
  ) -> dict[str, Float[Array, '...']]:
    """Sends matrices from their owners to the devices that hold them.

    Args:
      stacks: (owners, slots, rows, n) by name.
      layout: the layout of the stacks.
      symmetric: whether the matrices are symmetric, so that half of each is enough.

    Returns:
      By name, (count, n, n) on every device, or stacks with their owners.
    """
    ...

  def own(self, held: Mapping[str, Float[Array, '...']], layout: Layout) -> dict[str, Float[Array, 'o s r n']]:
    """Returns stacks, each with its owner; it reverses `share`. Padding slots may hold any values.

    Args:
      held: the result of `share`.
      layout: the layout of the stacks.
    """
    ...

  def replicate(self, values: Any) -> Any:
    """Returns the same `values`, a tree of arrays, on every device."""
    ...


class Local(NamedTuple):
  """Implements `Placement` for a program without a mesh.

  Attributes:
    owners: the number of owners.
    local_inverses: whether inverses stay with their owners, see `Deal`.
    row_sharded: whether matrices may be split by rows over all owners, see `Deal`.
    axes: the mesh axes that number the owners; there are none.
  """

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
