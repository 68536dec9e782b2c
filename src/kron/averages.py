"""Moving averages of the factors, in stacks: what every transformation that uses them keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .blocks import Block
from .stacks import Layout
from .statistics import Statistics


class Placement(Protocol):
  """The seam through which stacks are spread over a mesh (`kronmesh.parallel.Placement`).

  owners: leading length of the stacks.
  over_stacks: makes a function of trees of arrays that lead with the owner axis into one that runs owner by owner, its
    results on every device.
  replicate: the same values on every device.

  An object rather than several arguments, as optax.inject_hyperparams takes numbers and functions for hyper-parameters.
  """

  owners: int

  def over_stacks(self, fn: Callable) -> Callable: ...

  def replicate(self, values: Any) -> Any: ...


class Local(NamedTuple):
  """The placement of a program that knows of no mesh."""

  owners: int = 1

  def over_stacks(self, fn: Callable) -> Callable:
    return fn

  def replicate(self, values: Any) -> Any:
    return values


class Averages(NamedTuple):
  """Moving averages of the factors; stacks are named by the size of their matrices.

  factors: not yet divided by `weights`.
  weights: (owner, slot), the sum of the averages' weights so far: at most 1, and 0 before the first statistics.
  rejected_statistics: how many matrices were dropped so far for not being finite.
  """

  factors: dict[str, Float[Array, 'o s n n']]
  weights: dict[str, Float[Array, 'o s']]
  rejected_statistics: Int[Array, '']

  @classmethod
  def of_nothing(cls, layout: Layout) -> Averages:
    return cls(
      factors={s: jnp.zeros(shape, layout.dtypes[s]) for s, shape in layout.shapes.items()},
      weights={s: jnp.zeros(shape[:2], layout.dtypes[s]) for s, shape in layout.shapes.items()},
      rejected_statistics=jnp.zeros((), jnp.int32),
    )

  def add(
    self, stats: Statistics, layout: Layout, blocks: Sequence[Block], decay: Any, placement: Placement
  ) -> Averages:
    """Takes the batch's means in, but for matrices that are not finite."""
    return self.add_means(batch_means(stats, layout, blocks, placement), stats.examples > 0, decay)

  def add_means(self, new: dict[str, Float[Array, 'o s n n']], due: Any, decay: Any) -> Averages:
    """Takes means in where they are due and finite.

    Args:
      due, decay: for all, or by stack (owner, slot).
    """
    by_stack = lambda x, stack: x[stack] if isinstance(x, dict) else x  # noqa: E731
    factors, weights, rejected = {}, {}, self.rejected_statistics
    for stack, x in new.items():
      finite, wanted = jnp.isfinite(x).all((-1, -2)), by_stack(due, stack)
      take = finite & wanted
      rate = jnp.broadcast_to(jnp.asarray(by_stack(decay, stack), x.dtype), take.shape)
      old = self.factors[stack]
      mixed = rate[..., None, None] * old + (1 - rate)[..., None, None] * x
      factors[stack] = jnp.where(take[..., None, None], mixed, old)
      weights[stack] = jnp.where(take, rate * self.weights[stack] + (1 - rate), self.weights[stack])
      rejected = rejected + (~finite & wanted).sum(dtype=jnp.int32)
    return Averages(factors, weights, rejected)

  def means(self) -> dict[str, Float[Array, 'o s n n']]:
    """The factors without the bias towards their start at zero."""
    return {
      stack: x / jnp.where(self.weights[stack] > 0, self.weights[stack], 1)[..., None, None]
      for stack, x in self.factors.items()
    }


def batch_means(
  stats: Statistics, layout: Layout, blocks: Sequence[Block], placement: Placement
) -> dict[str, Float[Array, 'o s n n']]:
  """The factors of one batch, in stacks."""
  means = {block.name: block.operator.combine(stats.means(block.name)) for block in blocks}
  return layout.gather(placement.replicate(means))


def identities(layout: Layout) -> dict[str, Float[Array, 'o s n n']]:
  """A stack of identities for each size."""
  return {
    s: jnp.broadcast_to(jnp.eye(n, dtype=layout.dtypes[s]), (o, k, n, n)) for s, (o, k, n, _) in layout.shapes.items()
  }
