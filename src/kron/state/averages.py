"""Keeps moving averages of the factors, in stacks, for every transformation that uses factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..blocks.block import Block
from ..placing import Placement
from ..statistics import Statistics
from .stacks import Layout, Stacked


class Averages(NamedTuple):
  """Moving averages of the factors; stacks are named by the size of their matrices.

  factors: (owner, slot, rows, n) by stack, not yet divided by `weights`.
  weights: (owner, slot), the sum of the averages' weights so far, at most 1, and 0 before the first statistics.
  rejected_statistics: the number of matrices dropped so far because they were not finite.
  """

  factors: Stacked
  weights: Stacked
  rejected_statistics: Int[Array, '']

  @classmethod
  def of_nothing(cls, layout: Layout) -> Averages:
    return cls(
      factors=layout.zeros(),
      weights=layout.zero_numbers(),
      rejected_statistics=jnp.zeros((), jnp.int32),
    )

  def add(self, stats: Statistics, blocks: Sequence[Block], decay: Any, placement: Placement) -> Averages:
    """Adds the batch's means, except for matrices that are not finite and those that the batch has not observed."""
    layout = self.factors.layout
    return self.add_means(batch_means(stats, layout, blocks, placement), observed(stats, layout, blocks), decay)

  def add_means(self, new: Mapping[str, Float[Array, 'o s r n']], due: Any, decay: Any) -> Averages:
    """Adds means where they are due and finite.

    Args:
      due, decay: one value for all matrices, or values by stack (owner, slot).
    """
    by_stack = lambda x, name: x[name] if isinstance(x, dict) else x  # noqa: E731
    factors, weights, rejected = {}, {}, self.rejected_statistics
    for name, x in new.items():
      stack = self.factors.layout.stacks[name]
      finite, wanted = stack.together(jnp.isfinite(x).all((-1, -2))), by_stack(due, name)
      take = finite & wanted
      rate = jnp.broadcast_to(jnp.asarray(by_stack(decay, name), x.dtype), take.shape)
      old = self.factors[name]
      mixed = rate[..., None, None] * old + (1 - rate)[..., None, None] * x
      factors[name] = jnp.where(take[..., None, None], mixed, old)
      weights[name] = jnp.where(take, rate * self.weights[name] + (1 - rate), self.weights[name])
      dropped = ~finite & wanted
      rejected = rejected + (dropped[0] if stack.row_sharded else dropped).sum(dtype=jnp.int32)
    return Averages(self.factors.filled(factors), self.weights.filled(weights), rejected)

  def means(self) -> dict[str, Float[Array, 'o s r n']]:
    """Returns the factors without the bias towards their start at zero."""
    return {
      stack: x / jnp.where(self.weights[stack] > 0, self.weights[stack], 1)[..., None, None]
      for stack, x in self.factors.items()
    }


def observed(stats: Statistics, layout: Layout, blocks: Sequence[Block]) -> dict[str, Bool[Array, 'o s']]:
  """Returns which matrices the batch has observed, (owner, slot) by stack.

  A factor of inputs is a mean over the uses of its kernel. An expert without tokens, or a head that this batch does not
  use, gives no information about it. A factor of gradients is a mean over the examples, including those whose gradient
  is zero. The product of the two averages is therefore the mean of the products.
  """
  flags = {}
  for block in blocks:
    flags[block.name] = {}
    for name, factor in block.operator.factors.items():
      count = stats.used(block.name) if name == 'A' else stats.examples
      every = jnp.broadcast_to(count > 0, (factor.slots,)) & (stats.examples > 0)
      flags[block.name][name] = jnp.repeat(every, factor.parts)
  return {name: x > 0 for name, x in layout.gather_numbers(flags).items()}


def batch_means(
  stats: Statistics, layout: Layout, blocks: Sequence[Block], placement: Placement
) -> dict[str, Float[Array, 'o s r n']]:
  """Returns the factors of one batch, in stacks."""
  if stats.by_shard:
    shares = {block.name: block.operator.combine(stats.shares(block.name)) for block in blocks}
    return placement.collect(shares, layout)
  means = {block.name: block.operator.combine(stats.means(block.name)) for block in blocks}
  return layout.gather(placement.replicate(means))
