"""The blocks that make up the curvature, each for the parameters that share its factors."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..operators import Kronecker, Unit, Unitwise


class Block(NamedTuple):
  """One diagonal block of the curvature, named after its first parameter; `params` are in the operator's order."""

  name: str
  params: tuple[str, ...]
  operator: Kronecker | Unitwise | Unit
  dtype: Any  # the type of its statistics
  sampled_diagonal: bool = False  # its statistic is a squared sum of gradients, as it has no site
  partial: bool = False  # it does not hold every entry of its parameters
  flops: int = 0  # the cost of statistics for the batch that was read
  whole_batch: bool = False  # its statistics cannot be separated by shard and cover the whole batch

  def signature(self) -> tuple:
    factors = tuple((name, f.rows, f.n) for name, f in self.operator.factors.items())
    return self.params, self.operator.name, factors


def key_of(block: str) -> str:
  """Returns a block's name as checkpoints write it."""
  return block.replace('/', '.')
