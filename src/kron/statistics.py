"""Sums of factors over a batch, with the counts that turn them into means."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Float


class Statistics(NamedTuple):
  """What one batch says of the curvature. Sums: microbatches and shards add.

  sums: block -> factor -> sum of outer products, (slots, n, n).
  uses: block -> how many rows its input factor sums over.
  examples: how many observations there were; 0 means that no statistics were taken.
  """

  sums: dict[str, dict[str, Float[Array, 'slots n n']]]
  uses: dict[str, Float[Array, '']]
  examples: Float[Array, '']


def accumulate(*statistics: Statistics) -> Statistics:
  """The statistics of several microbatches as those of one batch.

  With fisher='empirical' or 'sampled' and losses that are means over their own microbatch, the result equals that of
  the joined batch (for a sampled Fisher: in distribution).
  """
  return jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *statistics)
