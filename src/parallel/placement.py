"""Where K-FAC's stacked factors live, and how they get there: KAISA (Pauloski et al. 2021, arXiv:2107.01739) on a mesh.

Each device owns the leading index of every stack that carries its number. At a refresh
  - the sums of the shards go to the owners: one reduce-scatter, triangular-packed, optionally in bfloat16;
  - owners invert; sizes of which there are too few are inverted by all together;
  - inverses go to their group by one all-gather, triangular-packed. One group is COMM-OPT: a step without refresh then
    communicates nothing more. Groups of one are MEM-OPT: inverses stay, and results are gathered at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from .collectives import all_reduce, reduce_scatter
from .mesh import STRIPS, MeshError, batch_axes, batch_shards
from .packing import fold, kept, mirrored, skew, unfold, unskew

APART = (*STRIPS, 'pipe')  # axes whose devices have their own part of every example's statistics


class Placement(NamedTuple):
  """`kron.kfac(..., placement=Placement(mesh))` deals factors over all devices of a mesh.

  mesh: data and model axes, in any order.
  fraction: of the devices that keep a block's inverses: 1 is COMM-OPT, 0 (or 1 / devices) MEM-OPT, between them HYBRID.
  statistics: the type in which statistics travel, 'float32' (their own, in fact) or 'bfloat16' (summed in their own).
  split: whether sizes of which there are too few for a fair deal may be split by rows over all devices.

  It is a `kron.Placement`; layouts and stacks are `kron.stacks`'.
  """

  mesh: Mesh
  fraction: float = 1.0
  statistics: str = 'float32'
  split: bool = True

  def check(self) -> Placement:
    """The placement itself.

    Raises:
      MeshError: a fraction that does not divide the devices, or an unknown type.
    """
    n = self.mesh.size
    members = round(self.fraction * n) or 1
    if not 0 <= self.fraction <= 1 or n % members or (members != 1 and members != self.fraction * n):
      raise MeshError(f'fraction={self.fraction} of {n} devices is no divisor of them; choose 0, 1 or one between')
    if self.statistics not in ('float32', 'bfloat16'):
      raise MeshError(f"statistics={self.statistics!r} is unknown; choose 'float32' or 'bfloat16'")
    if 1 < members < n and self.axes != self.mesh.axis_names:
      raise MeshError(f'fraction={self.fraction}: write the axes of the batch first, {",".join(self.axes)}')
    return self

  @property
  def owners(self) -> int:
    return self.mesh.size

  @property
  def groups(self) -> int:
    return self.owners // (round(self.check().fraction * self.owners) or 1)

  @property
  def axes(self) -> tuple[str, ...]:
    """Those along which owners are numbered: the batch's first, then those whose devices share statistics (see `along`)."""
    first = batch_axes(self.mesh)
    others = [a for a in self.mesh.axis_names if a not in first]
    return (*first, *sorted(others, key=lambda a: a in APART))

  @property
  def spec(self) -> PartitionSpec:
    """Of an array that leads with the owner axis."""
    return PartitionSpec(self.axes)

  @property
  def _grid(self) -> tuple[Mesh, tuple[str, ...], tuple[str, ...]]:
    """The mesh as groups and members, and the axes of both."""
    groups, members = self.groups, self.owners // self.groups
    if groups == 1:
      return self.auto, (), self.axes
    if members == 1:
      return self.auto, self.axes, ()
    devices = np.asarray(self.mesh.devices).reshape(groups, members)
    return Mesh(devices, ('group', 'member'), axis_types=(AxisType.Auto,) * 2), ('group',), ('member',)

  def sharding(self, field: str, stack: str) -> NamedSharding:
    """Of one stack of a state: in the field `inverses` as `share` leaves it, else with its owners."""
    if field != 'inverses':
      return NamedSharding(self.mesh, self.spec)
    grid, group_axes, _ = self._grid
    return NamedSharding(grid, PartitionSpec() if self._by_all(stack) else PartitionSpec(group_axes))

  def _by_all(self, stack: str) -> bool:
    return self.groups == 1 or stack.endswith('_shared')

  @property
  def auto(self) -> Mesh:
    """The mesh with Auto axes, as all here runs under."""
    return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * len(self.mesh.axis_names))

  def shards(self, batch_size: int) -> int:
    """Into how many parts statistics are taken: one for each device where the batch divides, else one for each part of it.

    Devices along `model` share the rows of their part of the batch; those along which images lie in strips have rows of
    their own of every example.
    """
    devices = math.prod(n for axis, n in self.mesh.shape.items() if axis not in APART)
    return devices if batch_size % devices == 0 else batch_shards(self.mesh)

  def place(self, x: Array, axis: int, divided: bool) -> Array:
    """Activations lie as the batch does; each device has whole rows of its own shard.

    Where activations are sharded along `model` the rows go over by an all-to-all, else nothing travels.
    """
    spec: list[Any] = [None if divided else PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = self.along(x.shape[axis]) if divided else batch_axes(self.mesh)
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and set(current.manual_axes) == set(current.axis_names):
      return x
    if not current.empty and current.manual_axes:  # inside of a shard_map over other axes
      return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.auto, PartitionSpec(*spec)))

  def along(self, shards: int) -> tuple[str, ...]:
    """The mesh axes of so many shards."""
    apart = tuple(a for a in self.axes if a not in APART)
    every = math.prod(self.mesh.shape[a] for a in apart)
    axes = apart if shards % every == 0 else batch_axes(self.mesh)
    if shards % math.prod(self.mesh.shape[a] for a in axes):
      raise MeshError(f'{shards} shards of statistics do not fit the mesh; pass kron.curvature(placement=)')
    return axes

  def over_shards(self, fn: Callable, shards: int) -> Callable:
    """`fn` of arrays that lead with shards, run by each device on its own.

    Left to the partitioner, the products of an image with itself become a convolution with a group for each shard, for
    which it gathers the images of all devices.
    """
    axes = self.along(shards)
    if jax.sharding.get_abstract_mesh().manual_axes or not axes:
      return fn
    spec = PartitionSpec(axes)
    return jax.shard_map(fn, mesh=self.auto, in_specs=spec, out_specs=spec, axis_names=set(axes), check_vma=False)

  def over_stacks(self, fn: Callable) -> Callable:
    """`fn` of trees that lead with the owner axis, run by each owner on its own part."""
    return jax.shard_map(fn, mesh=self.auto, in_specs=self.spec, out_specs=self.spec, check_vma=False)

  def over_groups(self, fn: Callable, layout: Any) -> Callable:
    """`fn` of (stacks as shared, trees that lead with the group axis), run by each group; every device gets the results."""
    grid, group_axes, _ = self._grid
    specs = {name: PartitionSpec() if s.shared else PartitionSpec(group_axes) for name, s in layout.stacks.items()}

    def local(stacks: dict[str, Array], inputs: Any) -> Any:
      return jax.tree.map(lambda x: jax.lax.all_gather(x, group_axes, tiled=True), fn(stacks, inputs))

    return jax.shard_map(
      local, mesh=grid, in_specs=(specs, PartitionSpec(group_axes)), out_specs=PartitionSpec(), check_vma=False
    )

  def collect(self, shares: Mapping[str, Mapping[str, Array]], layout: Any) -> dict[str, Array]:
    """Stacks with their owners, from what each shard of the batch adds to every factor."""
    given = next(iter(next(iter(shares.values())).values())).shape[0]
    axes = self.along(given)

    def local(shares: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
      own = {block: {f: x.sum(0) for f, x in parts.items()} for block, parts in shares.items()}
      return {name: self._to_owner(x, layout, name, axes) for name, x in layout.joined(own).items()}

    spec = PartitionSpec(axes) if axes else PartitionSpec()
    return jax.shard_map(local, mesh=self.auto, in_specs=spec, out_specs=self.spec, check_vma=False)(shares)

  def _to_owner(self, x: Array, layout: Any, name: str, axes: tuple[str, ...]) -> Array:
    """This owner's (1, slot, rows, n) of the sum over the mesh axes of (matrix, n, n)."""
    stack = layout.stacks[name]
    others = tuple(a for a in self.axes if a not in axes)
    half = jnp.bfloat16 if self.statistics == 'bfloat16' and x.dtype == jnp.float32 else None
    if stack.sparse:
      # Most of what a reduce-scatter would move is padding.
      summed = unfold(all_reduce(fold(x), axes, half=half), stack.n) if axes else x
      return stack.take(layout.orders[name], jax.lax.axis_index(self.axes), summed)
    packed = stack.put(skew(x) if stack.split else fold(x), layout.orders[name])
    if axes:
      packed = reduce_scatter(packed, axes, half=half)
    if others:
      packed = jax.lax.dynamic_slice_in_dim(packed, jax.lax.axis_index(others), 1)
    return self._whole_rows(packed[0], stack)[None] if stack.split else unfold(packed, stack.n)

  def _whole_rows(self, half: Array, stack: Any) -> Array:
    """An owner's rows, (slot, rows, n), from what `skew` keeps of them: the rest are columns of the other owners."""
    owners, r, n = stack.owners, stack.rows, stack.n
    first = jax.lax.axis_index(self.axes) * r
    own = unskew(half, n, first)
    tiles = jnp.pad(own, ((0, 0), (0, 0), (0, owners * r - n))).reshape(-1, r, owners, r)
    theirs = jax.lax.all_to_all(jnp.moveaxis(tiles, 2, 0), self.axes, 0, 0, tiled=True)  # owner, slot, row, my row
    columns = jnp.transpose(theirs, (1, 3, 0, 2)).reshape(-1, r, owners * r)[..., :n]
    return jnp.where(kept(r, n, first), own, columns)

  def share(self, stacks: Mapping[str, Array], layout: Any, symmetric: bool = True) -> dict[str, Array]:
    """Matrices from their owners to every device, (matrix, n, n), or to their groups; triangular-packed if symmetric."""
    grid, group_axes, member_axes = self._grid
    everyone = (*group_axes, *member_axes)

    def to_all(x: Array, name: str) -> Array:
      stack, at = layout.stacks[name], layout.positions(name)
      if stack.split:
        rows = skew(x[0], jax.lax.axis_index(everyone) * stack.rows)
        half = jax.lax.all_gather(rows, everyone)  # owner, slot, row
        return mirrored(
          unskew(jnp.moveaxis(half, 0, 1).reshape(stack.slots, -1, rows.shape[-1])[:, : stack.n], stack.n)
        )
      x = fold(x) if symmetric else x
      if stack.sparse:
        mine = jnp.asarray(at // stack.slots) == jax.lax.axis_index(everyone)
        x = jax.lax.psum(jnp.where(mine[:, None, None], x[0, at % stack.slots], 0), everyone)
      else:
        x = jax.lax.all_gather(x, everyone, tiled=True)
        x = x.reshape(-1, *x.shape[2:])[at]
      return unfold(x, stack.n) if symmetric else x

    def to_group(x: Array, name: str) -> Array:
      if not member_axes:
        return x
      if layout.stacks[name].split or not symmetric:
        return jax.lax.all_gather(x, member_axes, tiled=True)
      return unfold(jax.lax.all_gather(fold(x), member_axes, tiled=True), x.shape[-1])

    def local(stacks: Mapping[str, Array]) -> dict[str, Array]:
      return {name: (to_all if layout.stacks[name].shared else to_group)(x, name) for name, x in stacks.items()}

    specs = {name: PartitionSpec() if layout.stacks[name].shared else PartitionSpec(group_axes) for name in stacks}
    owners = PartitionSpec(everyone)
    return jax.shard_map(local, mesh=grid, in_specs=owners, out_specs=specs, check_vma=False)(dict(stacks))

  def own(self, held: Mapping[str, Array], layout: Any) -> dict[str, Array]:
    """The inverse of `share`; nothing travels. Padding holds anything."""
    grid, group_axes, member_axes = self._grid
    everyone = (*group_axes, *member_axes)

    def local(held: Mapping[str, Array]) -> dict[str, Array]:
      result = {}
      for name, x in held.items():
        if layout.stacks[name].shared:
          x = layout.stacks[name].take(layout.orders[name], jax.lax.axis_index(everyone), x)
        elif member_axes:
          x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(member_axes), 1)
        result[name] = x
      return result

    specs = {name: PartitionSpec() if layout.stacks[name].shared else PartitionSpec(group_axes) for name in held}
    owners = PartitionSpec(everyone)
    return jax.shard_map(local, mesh=grid, in_specs=(specs,), out_specs=owners, check_vma=False)(dict(held))

  def replicate(self, values: Any) -> Any:
    """The same values on every device."""
    return jax.lax.with_sharding_constraint(values, NamedSharding(self.auto, PartitionSpec()))
