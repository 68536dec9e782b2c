"""Sums statistics over each shard of the batch, so that a mesh need not sum whole factors on every device.

Rows that lead with examples are reshaped to (shards, rows of a shard, ...). If the batch is sharded in the same way,
this moves no data, and each device keeps the sum of its examples until a `Placement` adds the sums at their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ..errors import CurvatureError
from ..explicit import explicit, typed
from ..placing import Placement
from ..statistics import BlockSums, degree
from .probes import Probes


class Shards(NamedTuple):
  """The division of the batch into `count` equal shards; statistics use the first examples of each shard.

  subsample: the share of each shard's examples that the statistics use.
  placement: the placement of the shards on devices.
  """

  count: int = 1
  subsample: float = 1.0
  placement: Placement | None = None

  def fitted(self, examples: Sequence[int]) -> Shards:
    """Returns shards with the placement's count for batches of these lengths, or one shard if no lengths are known."""
    if self.placement is None:
      return self
    return self._replace(count=min((self.placement.shards(n) for n in examples), default=1))

  @property
  def trivial(self) -> bool:
    return self.count == 1 and self.subsample == 1

  @property
  def lead(self) -> tuple[int, ...]:
    """Returns the axis that statistics lead with, which is empty for a single shard."""
    return (self.count,) if self.count > 1 else ()

  def check(self, examples: Sequence[int]) -> None:
    """Raises CurvatureError if batches of these lengths do not divide into the shards."""
    if not 0 < self.subsample <= 1:
      raise CurvatureError(f'subsample={self.subsample}: choose one in (0, 1]')
    if self.trivial:
      return
    if not examples:
      raise CurvatureError(f'subsample={self.subsample}: the observations have no axis that counts examples')
    for n in examples:
      if n % self.count:
        raise CurvatureError(f'shards={self.count}: {n} examples do not divide by that; change the batch or the mesh')
      if not self.fits(n):
        each = n // self.count
        raise CurvatureError(
          f'subsample={self.subsample} of the {each} examples of a shard is not a whole number; change one'
        )

  def fits(self, length: int) -> bool:
    """Checks whether an axis of this length divides into such parts."""
    kept = length / self.count * self.subsample
    return length % self.count == 0 and abs(kept - round(kept)) < 1e-6 and round(kept) >= 1

  def cut(self, x: Array, axis: int) -> Array:
    """Cuts (..., b, ...) into (shards, ..., kept, ...)."""
    x = x if self.placement is None else self.placement.place(x, axis, False)
    shape = (*x.shape[:axis], self.count, x.shape[axis] // self.count, *x.shape[axis + 1 :])
    kept = round(shape[axis + 1] * self.subsample)
    x = jax.lax.slice_in_dim(x.reshape(shape), 0, kept, axis=axis + 1)
    x = jnp.moveaxis(x, axis, 0)
    return x if self.placement is None else self.placement.place(x, 0, True)

  @property
  def spec(self) -> PartitionSpec:
    """Returns the sharding of statistics, which lead with shards if there are several."""
    return PartitionSpec(self.placement.along(self.count)) if self.lead and self.placement else PartitionSpec()

  def typed(self, probes: Probes, loops: Mapping[str, tuple[int, ...]]) -> Probes:
    """Gives the probes the types of their statistics, under Explicit axes."""
    if not explicit():
      return probes
    if not self.lead:
      return probes

    def one(z: Array, depth: int) -> Array:
      by_shard = z.ndim > depth + 3
      return typed(z, PartitionSpec(*(None,) * depth, *self.spec)) if by_shard else z

    return {
      name: probe._replace(products={k: one(z, len(loops[name])) for k, z in probe.products.items()})
      for name, probe in probes.items()
    }

  def of_each(
    self,
    statistics: Callable[..., BlockSums],
    arrays: Sequence[Array],
    axes: Sequence[int],
    by_device: bool = False,
  ) -> BlockSums:
    """Returns the statistics of each shard from arrays that have examples along these axes; counts are summed.

    by_device: whether each device computes its statistics by itself, because a partitioner would gather their inputs.
    """
    parts = [self.cut(x, axis) for x, axis in zip(arrays, axes, strict=True)]
    each = jax.vmap(statistics)
    if by_device and self.placement is not None:
      each = self.placement.over_shards(each, self.count)
    sums = each(*parts)
    products = sums.products if self.lead else {k: s[0] for k, s in sums.products.items()}
    return BlockSums(products, {k: s.sum(0) for k, s in sums.uses.items()})

  def of_all(self, sums: BlockSums) -> BlockSums:
    """Divides the whole batch's statistics evenly over the shards; those of gradients are scaled by `subsample` too."""

    def one(name: str, s: Array) -> Array:
      share = (self.subsample if degree(name) else 1.0) / self.count
      return jnp.broadcast_to(s * jnp.asarray(share, s.dtype), (*self.lead, *s.shape))

    return sums._replace(products={k: one(k, s) for k, s in sums.products.items()})


WHOLE = Shards()
