"""Sums of factors over a batch, with the counts that turn them into means."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class BlockSums(NamedTuple):
  """What the uses of one block's parameters add up to.

  products: sums of outer products, by statistic: A and G, or F; of a kernel also used transposed A' and G'; S, the second
    moments in an eigenbasis.
  uses: over how many rows the statistics of inputs, A and A', sum.
  """

  products: dict[str, Any]
  uses: dict[str, Any]


class Statistics(NamedTuple):
  """What one batch says of the curvature. Sums: microbatches and shards add.

  sums: block -> statistic -> sum of outer products, (slots, n, n). A and G, of a kernel also used transposed A' and G'.
    With `curvature(placement=)` they lead with an axis of shards, each with the sum of its own examples.
  uses: block -> over how many rows the statistics of its inputs, A and A', sum: (slots,), after the iterations of the loops
    that slice a kernel.
  examples: how many observations there were; 0 means that no statistics were taken.
  """

  sums: dict[str, dict[str, Float[Array, 'slots n n']]]
  uses: dict[str, dict[str, Float[Array, '*loops slots']]]
  examples: Float[Array, '']

  @property
  def by_shard(self) -> bool:
    """Whether the sums lead with an axis of shards."""
    return any(s.ndim == 4 for parts in self.sums.values() for s in parts.values())

  @classmethod
  def of(cls, blocks: dict[str, BlockSums], examples: Array) -> Statistics:
    """From what the probes returned."""
    return cls({b: own.products for b, own in blocks.items()}, {b: own.uses for b, own in blocks.items()}, examples)

  def of_loss_times(self, factor: Any) -> Statistics:
    """What they would be of a loss so many times as large, as far as they come from its own gradient."""
    times = lambda name, s: s * jnp.asarray(factor, s.dtype) ** degree(name)  # noqa: E731
    return self._replace(sums={b: {k: times(k, s) for k, s in own.items()} for b, own in self.sums.items()})

  def used(self, block: str) -> Float[Array, ' slots']:
    """How often each slot of a kernel was used, transposed uses included."""
    return sum(count.reshape(-1) for count in self.uses[block].values())

  def means(self, block: str) -> dict[str, Float[Array, 'slots n n']]:
    """The statistics of a block as means: those of inputs over the uses, those of gradients over the observations."""
    return {k: s.sum(0) if s.ndim == 4 else s for k, s in self.shares(block).items()}

  def shares(self, block: str) -> dict[str, Float[Array, '*shards slots n n']]:
    """What each shard adds to the means."""
    shares = {}
    for name, s in self.sums[block].items():
      count = self.uses[block].get(name, self.examples)
      count = jnp.repeat(count.reshape(-1), s.shape[-3] // count.size)[:, None, None]
      shares[name] = s / jnp.where(count > 0, count, 1).astype(s.dtype)
    return shares


OF_INPUTS = ('A', "A'")


def degree(statistic: str) -> int:
  """Returns how a statistic grows with the loss's gradient: not at all (0) if it is one of inputs, else with its square."""
  return 0 if statistic in OF_INPUTS else 2


def accumulate(*statistics: Statistics) -> Statistics:
  """The statistics of several microbatches as those of one batch.

  With fisher='empirical' or 'sampled' and losses that are means over their own microbatch, the result equals that of
  the joined batch (for a sampled Fisher: in distribution).
  """
  return jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *statistics)
