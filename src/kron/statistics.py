"""Sums of factors over a batch, with the counts that turn them into means."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class BlockSums(NamedTuple):
  """The sums over all uses of one block's parameters.

  products: sums of outer products, by statistic: A and G, or F; also A' and G' for a kernel that is also used
    transposed; and S, the second moments in an eigenbasis.
  uses: the number of rows that the statistics of inputs, A and A', sum over.
  """

  products: dict[str, Any]
  uses: dict[str, Any]


class Statistics(NamedTuple):
  """Holds the statistics of one batch for the curvature. They are sums, so microbatches and shards add up.

  Attributes:
    sums: block -> statistic -> sum of outer products, (slots, n, n): A and G for a kernel, also A' and G' for a kernel
      that is also used transposed; F for a block with one factor. With `curvature(placement=)` they lead with an axis
      of shards, each with the sum of its examples. With `value_and_grad(basis=)` there is S too, the second moments in
      the eigenbasis, (slots, rows, columns).
    uses: block -> statistic of its inputs, A or A' -> the number of rows in the sum, (*loops, slots), where `loops` are
      the lengths of the loops that slice a kernel.
    examples: the number of observations, of shape (); 0 means that no statistics were taken.
  """

  sums: dict[str, dict[str, Float[Array, 'slots n n']]]
  uses: dict[str, dict[str, Float[Array, '*loops slots']]]
  examples: Float[Array, '']

  @property
  def by_shard(self) -> bool:
    """Returns whether the sums lead with an axis of shards."""
    return any(s.ndim == 4 for parts in self.sums.values() for s in parts.values())

  @classmethod
  def of(cls, blocks: dict[str, BlockSums], examples: Float[Array, '']) -> Statistics:
    """Makes statistics from the sums that the probes returned for all `blocks`, and the number of `examples`."""
    return cls({b: sums.products for b, sums in blocks.items()}, {b: sums.uses for b, sums in blocks.items()}, examples)

  def of_loss_times(self, factor: Any) -> Statistics:
    """Returns the statistics for a loss that is `factor` times as large, if they come from the loss's gradient."""
    times = lambda name, s: s * jnp.asarray(factor, s.dtype) ** degree(name)  # noqa: E731
    return self._replace(sums={b: {k: times(k, s) for k, s in products.items()} for b, products in self.sums.items()})

  def used(self, block: str) -> Float[Array, ' slots']:
    """Returns how often each slot of the kernel of `block` was used, transposed uses included."""
    return sum(count.reshape(-1) for count in self.uses[block].values())

  def means(self, block: str) -> dict[str, Float[Array, 'slots n n']]:
    """Returns the statistics of `block` as means: those of inputs over the uses, of gradients over the observations."""
    return {k: s.sum(0) if s.ndim == 4 else s for k, s in self.shares(block).items()}

  def shares(self, block: str) -> dict[str, Float[Array, '*shards slots n n']]:
    """Returns the contribution of each shard to the means of `block`."""
    shares = {}
    for name, s in self.sums[block].items():
      count = self.uses[block].get(name, self.examples)
      count = jnp.repeat(count.reshape(-1), s.shape[-3] // count.size)[:, None, None]
      shares[name] = s / jnp.where(count > 0, count, 1).astype(s.dtype)
    return shares


OF_INPUTS = ('A', "A'")


def degree(statistic: str) -> int:
  """Returns the power of the loss's gradient in a statistic: 0 for a statistic of inputs, 2 for any other."""
  return 0 if statistic in OF_INPUTS else 2


def accumulate(*statistics: Statistics) -> Statistics:
  """Joins the statistics of several microbatches into those of one batch.

  With fisher='empirical' or 'sampled', and losses that are means over their microbatch, the result equals that of the
  joined batch (for a sampled Fisher: in distribution).

  Args:
    *statistics: one or more results of `value_and_grad`, with the same blocks and shapes.

  Returns:
    A `Statistics` of the same shapes, in which sums, uses and numbers of examples are added up.
  """
  return jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *statistics)
