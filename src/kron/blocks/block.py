"""What the curvature is made of: blocks, each of the parameters that share its factors."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..operators import Kronecker, Unit, Unitwise


class Block(NamedTuple):
  """One diagonal block of the curvature. `name` is that of its first parameter, `params` are in the operator's order."""

  name: str
  params: tuple[str, ...]
  operator: Kronecker | Unitwise | Unit
  dtype: Any  # of its statistics
  sampled_diagonal: bool = False  # its statistic is a squared sum of gradients, for want of a site
  partial: bool = False  # it does not hold every entry of its parameters
  flops: int = 0  # of the statistics of the batch that was read
  whole_batch: bool = False  # its statistics cannot be told apart by shard, and are of the whole batch

  def signature(self) -> tuple:
    factors = tuple((name, f.rows, f.n) for name, f in self.operator.factors.items())
    return self.params, self.operator.name, factors


def key_of(block: str) -> str:
  """A block's name as checkpoints write it."""
  return block.replace('/', '.')
