"""The placement of K-FAC's stacked factors on a mesh, after KAISA (Pauloski et al. 2021, arXiv:2107.01739).

Each device owns the part of every stack whose leading index is the device's number. At a refresh
  - the sums of the shards go to the owners by one reduce-scatter, triangular-packed, optionally in bfloat16;
  - owners invert; if there are too few matrices of a size, all owners invert them together;
  - inverses go to every device by one all-gather, triangular-packed (COMM-OPT: a step without a refresh communicates
    nothing more); or they stay with their owners, and every step gathers preconditioned gradients (MEM-OPT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from .collectives import all_reduce, reduce_scatter
from .mesh import STRIPS, MeshError, batch_axes, batch_shards
from .packing import fold, kept, mirrored, skew, unfold, unskew

APART = (*STRIPS, 'pipe')  # axes whose devices each have a part of every example's statistics


@runtime_checkable
class Stacked(Protocol):
  """Arrays of an optimiser's state that a placement spreads over a mesh: `kron.Stacked`."""

  layout: Any
  held: bool

  def filled(self, arrays: Mapping[str, Any]) -> Any: ...


class Placement(NamedTuple):
  """Deals K-FAC's factors over all devices of a mesh: `kron.kfac(..., placement=Placement(mesh))`.

  Each device owns a part of every stack of factors (KAISA, Pauloski et al. 2021, arXiv:2107.01739). The sums of the
  shards go to the owners by one reduce-scatter. The owners invert, and the inverses go to every device by one
  all-gather (COMM-OPT), or stay with their owners (MEM-OPT). It implements `kron.Placement`. Give the same placement to
  `kron.curvature` and to the optimiser.

  Attributes:
    mesh: a mesh with data and model axes, in any order.
    inverses: where inverses are kept: 'everywhere' (COMM-OPT), or with their 'owners' (MEM-OPT).
    statistics: the type in which statistics are sent. 'float32' sends them in their own type. 'bfloat16' sends bfloat16
      and sums in the statistics' own type.
    row_sharded: whether matrices may be split by rows over all devices if there are too few of their size for a fair
      deal.
  """

  mesh: Mesh
  inverses: str = 'everywhere'
  statistics: str = 'float32'
  row_sharded: bool = True

  def check(self) -> Placement:
    """Returns the placement itself if its settings are known.

    Raises:
      MeshError: the place or the type is unknown.
    """
    if self.inverses not in ('everywhere', 'owners'):
      raise MeshError(f"inverses={self.inverses!r} is unknown; choose 'everywhere' or 'owners'")
    if self.statistics not in ('float32', 'bfloat16'):
      raise MeshError(f"statistics={self.statistics!r} is unknown; choose 'float32' or 'bfloat16'")
    return self

  @property
  def owners(self) -> int:
    return self.mesh.size

  @property
  def local_inverses(self) -> bool:
    return self.check().inverses == 'owners'

  @property
  def axes(self) -> tuple[str, ...]:
    """Returns the mesh axes that number the owners.

    The axes of the batch come first. The axes whose devices share statistics (see `along`) come last.
    """
    first = batch_axes(self.mesh)
    others = [a for a in self.mesh.axis_names if a not in first]
    return (*first, *sorted(others, key=lambda a: a in APART))

  @property
  def spec(self) -> PartitionSpec:
    """Returns the partition of an array whose leading axis is the owner axis."""
    return PartitionSpec(self.axes)

  def shardings(self, stacked: Stacked) -> Any:
    """Returns the sharding of each stack of a state: inverses lie as `share` leaves them, all else with its owners.

    Args:
      stacked: a `kron.Stacked` of a state, of arrays or ShapeDtypeStructs.
    """
    sharded, everywhere = (NamedSharding(self.mesh, spec) for spec in (self.spec, PartitionSpec()))
    stacks = stacked.layout.stacks
    return stacked.filled({name: everywhere if stacked.held and stacks[name].shared else sharded for name in stacks})

  @property
  def auto(self) -> Mesh:
    """Returns the mesh with Auto axes, under which all methods here run."""
    return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * len(self.mesh.axis_names))

  def shards(self, batch_size: int) -> int:
    """Returns the number of shards of the statistics: one for each device, or one for each shard of the batch.

    The latter applies if the batch does not divide evenly over the devices. Devices along `model` share the rows of
    their shard of the batch. Devices along the axes of image strips have separate rows of every example.

    Args:
      batch_size: the number of examples.
    """
    devices = math.prod(n for axis, n in self.mesh.shape.items() if axis not in APART)
    return devices if batch_size % devices == 0 else batch_shards(self.mesh)

  def place(self, x: Shaped[Array, '...'], axis: int, divided: bool) -> Shaped[Array, '...']:
    """Returns activations with a constraint on their sharding.

    If activations are sharded over `model`, an all-to-all moves the rows. Otherwise the devices send nothing.

    Args:
      x: the activations.
      axis: the axis that counts examples, or shards if `divided`.
      divided: whether each device gets whole rows of its shard; else the activations are sharded like the batch.
    """
    spec: list[Any] = [None if divided else PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = self.along(x.shape[axis]) if divided else batch_axes(self.mesh)
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and set(current.manual_axes) == set(current.axis_names):
      return x
    if not current.empty and current.manual_axes:  # inside a shard_map over other axes
      return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.auto, PartitionSpec(*spec)))

  def along(self, shards: int) -> tuple[str, ...]:
    """Returns the mesh axes that carry a number of `shards`.

    Raises:
      MeshError: this number of shards does not fit the mesh.
    """
    apart = tuple(a for a in self.axes if a not in APART)
    every = math.prod(self.mesh.shape[a] for a in apart)
    axes = apart if shards % every == 0 else batch_axes(self.mesh)
    if shards % math.prod(self.mesh.shape[a] for a in axes):
      raise MeshError(f'{shards} shards of statistics do not fit the mesh; pass kron.curvature(placement=)')
    return axes

  def over_shards(self, fn: Callable, shards: int) -> Callable:
    """Makes each device run `fn`, a function of arrays that lead with `shards`, on its shards alone.

    The partitioner would turn the products of an image with itself into a convolution with a group for each shard, and
    gather the images of all devices for it.
    """
    axes = self.along(shards)
    if jax.sharding.get_abstract_mesh().manual_axes or not axes:
      return fn
    spec = PartitionSpec(axes)
    return jax.shard_map(fn, mesh=self.auto, in_specs=spec, out_specs=spec, axis_names=set(axes), check_vma=False)

  def over_stacks(self, fn: Callable) -> Callable:
    """Makes each owner run `fn`, a function of trees that lead with the owner axis, on its part."""
    return jax.shard_map(fn, mesh=self.auto, in_specs=self.spec, out_specs=self.spec, check_vma=False)

  def at_owners(self, fn: Callable, layout: Any) -> Callable:
    """Makes owners run a function on their parts; every device gets the results.

    Args:
      fn: takes stacks that `share` returned and trees that lead with the owner axis; its results lead with that axis.
      layout: the `kron.Layout` of the stacks.
    """

    def local(stacks: dict[str, Array], inputs: Any) -> Any:
      return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes, tiled=True), fn(stacks, inputs))

    specs = (self._held(layout), self.spec)
    run = jax.shard_map(local, mesh=self.auto, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return lambda stacks, inputs: run(dict(stacks), inputs)

  def _held(self, layout: Any) -> dict[str, PartitionSpec]:
    """Returns the partition of each stack of inverses, by name."""
    return {name: PartitionSpec() if stack.shared else self.spec for name, stack in layout.stacks.items()}

  def collect(
    self, shares: Mapping[str, Mapping[str, Float[Array, 'shards slots n n']]], layout: Any
  ) -> dict[str, Float[Array, 'o s r c']]:
    """Returns the sums over all shards of the batch, as stacks of factors at their owners.

    Args:
      shares: block -> factor -> each shard's contribution, (shards, slots, n, n).
      layout: the `kron.Layout` of the stacks.
    """
    given = next(iter(next(iter(shares.values())).values())).shape[0]
    axes = self.along(given)

    def local(shares: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
      sums = {block: {f: x.sum(0) for f, x in parts.items()} for block, parts in shares.items()}
      return {name: self._to_owner(x, layout, name, axes) for name, x in layout.joined(sums).items()}

    spec = PartitionSpec(axes) if axes else PartitionSpec()
    return jax.shard_map(local, mesh=self.auto, in_specs=spec, out_specs=self.spec, check_vma=False)(shares)

  def _to_owner(self, x: Array, layout: Any, name: str, axes: tuple[str, ...]) -> Array:
    """Returns this owner's (1, slot, rows, n) of the sum over the mesh axes of (matrix, n, n)."""
    stack = layout.stacks[name]
    others = tuple(a for a in self.axes if a not in axes)
    half = jnp.bfloat16 if self.statistics == 'bfloat16' and x.dtype == jnp.float32 else None
    if stack.sparse:
      # A reduce-scatter would move mostly padding.
      summed = unfold(all_reduce(fold(x), axes, half=half), stack.n) if axes else x
      return stack.take(layout.orders[name], jax.lax.axis_index(self.axes), summed)
    packed = stack.put(skew(x) if stack.row_sharded else fold(x), layout.orders[name])
    if axes:
      packed = reduce_scatter(packed, axes, half=half)
    if others:
      packed = jax.lax.dynamic_slice_in_dim(packed, jax.lax.axis_index(others), 1)
    return self._whole_rows(packed[0], stack)[None] if stack.row_sharded else unfold(packed, stack.n)

  def _whole_rows(self, half: Array, stack: Any) -> Array:
    """Returns an owner's (slot, rows, n) from the part that `skew` keeps; other owners send the rest as columns."""
    owners, r, n = stack.owners, stack.rows, stack.n
    first = jax.lax.axis_index(self.axes) * r
    local_part = unskew(half, n, first)
    tiles = jnp.pad(local_part, ((0, 0), (0, 0), (0, owners * r - n))).reshape(-1, r, owners, r)
    theirs = jax.lax.all_to_all(jnp.moveaxis(tiles, 2, 0), self.axes, 0, 0, tiled=True)  # owner, slot, row, my row
    columns = jnp.transpose(theirs, (1, 3, 0, 2)).reshape(-1, r, owners * r)[..., :n]
    return jnp.where(kept(r, n, first), local_part, columns)

  def share(
    self, stacks: Mapping[str, Float[Array, 'o s r n']], layout: Any, symmetric: bool = True
  ) -> dict[str, Float[Array, '...']]:
    """Sends matrices from their owners to every device, triangular-packed if symmetric.

    Args:
      stacks: (owners, slots, rows, n) by name.
      layout: the `kron.Layout` of the stacks.
      symmetric: whether the matrices are symmetric.

    Returns:
      By name, (count, n, n) on every device, or the stack as it was where the inverses stay with their owners.
    """

    def to_all(x: Array, name: str) -> Array:
      stack, at = layout.stacks[name], layout.positions(name)
      if not stack.shared:
        return x
      if stack.row_sharded:
        rows = skew(x[0], jax.lax.axis_index(self.axes) * stack.rows)
        half = jax.lax.all_gather(rows, self.axes)  # owner, slot, row
        whole = jnp.moveaxis(half, 0, 1).reshape(stack.slots, -1, rows.shape[-1])[:, : stack.n]
        return mirrored(unskew(whole, stack.n))
      x = fold(x) if symmetric else x
      if stack.sparse:
        mine = jnp.asarray(at // stack.slots) == jax.lax.axis_index(self.axes)
        x = jax.lax.psum(jnp.where(mine[:, None, None], x[0, at % stack.slots], 0), self.axes)
      else:
        x = jax.lax.all_gather(x, self.axes, tiled=True)
        x = x.reshape(-1, *x.shape[2:])[at]
      return unfold(x, stack.n) if symmetric else x

    local = lambda stacks: {name: to_all(x, name) for name, x in stacks.items()}  # noqa: E731
    specs = {name: spec for name, spec in self._held(layout).items() if name in stacks}
    return jax.shard_map(local, mesh=self.auto, in_specs=self.spec, out_specs=specs, check_vma=False)(dict(stacks))

  def own(self, held: Mapping[str, Float[Array, '...']], layout: Any) -> dict[str, Float[Array, 'o s r n']]:
    """Returns each owner's part of shared stacks, without communication; it reverses `share`.

    Padding slots may hold any values.

    Args:
      held: the result of `share`.
      layout: the `kron.Layout` of the stacks.
    """

    def mine(x: Array, name: str) -> Array:
      stack = layout.stacks[name]
      return stack.take(layout.orders[name], jax.lax.axis_index(self.axes), x) if stack.shared else x

    local = lambda held: {name: mine(x, name) for name, x in held.items()}  # noqa: E731
    specs = {name: spec for name, spec in self._held(layout).items() if name in held}
    return jax.shard_map(local, mesh=self.auto, in_specs=(specs,), out_specs=self.spec, check_vma=False)(dict(held))

  def replicate(self, values: Any) -> Any:
    """Returns the same `values`, a tree of arrays, on every device."""
    return jax.lax.with_sharding_constraint(values, NamedSharding(self.auto, PartitionSpec()))
