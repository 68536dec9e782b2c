"""Defines blocks with one small matrix per channel, for a norm's scale and shift or for one free parameter.

A free parameter meets data entry by entry (y = c x s + b, a learned temperature) or is put beside it (class tokens,
position embeddings). Let ds and db be the gradients of one example, summed over its positions. The block is then the
2 x 2 matrix E[(ds, db)(ds, db)T] for each channel (SP-NGD, Osawa et al. 2020, section 4.2), or E[ds^2] alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ..statistics import BlockSums
from .factor import Factor, accurate, whole
from .weights import Arrangement


class Unit(NamedTuple):
  """The block of a scale and a shift, or of either alone, each laid out as (channels,) in the same order.

  layouts: the layout of each; one layout may join several parameters.
  loops: the number of loop iterations that slice them; the layouts hold the channels of all iterations.
  spread: for a parameter whose entries were picked several times (a table of relative positions), the arrangement that
    takes the gradient of what was picked, channel by channel, back to the parameter's entries.
  """

  name: str
  layouts: tuple[Arrangement, ...]
  shapes: tuple[tuple[int, ...], ...]
  loops: int = 1
  spread: Arrangement | None = None

  reduced = None
  transposed = False

  @property
  def factors(self) -> dict[str, Factor]:
    return {'F': whole(math.prod(self.layouts[0].shape), len(self.layouts))}

  def probes(self) -> BlockSums:
    k = len(self.layouts)
    return BlockSums({'F': (self.factors['F'].slots // self.loops, k, k)}, {})

  def statistics(self, gradients: list[Float[Array, 'b c']]) -> BlockSums:
    """Sums the outer products of the examples' gradients, channel by channel."""
    if self.spread is not None:
      (g,) = gradients
      back = lambda x: self.spread.back(self.shapes, x.reshape(self.spread.shape))[0].reshape(-1)  # noqa: E731
      gradients = [jax.vmap(back)(g)]
    u = jnp.stack(gradients, axis=-1)
    # Not an einsum: one fused reduction compiles in half the time of a batched product of tiny matrices.
    return BlockSums({'F': (u[..., :, None] * u[..., None, :]).sum(0)}, {})

  def finish(self, sums: BlockSums, basis: None = None) -> BlockSums:
    del basis
    return sums

  def combine(self, means: dict[str, Array]) -> dict[str, Array]:
    return means

  def to_matrix(self, *gradients: Array) -> Float[Array, 'c k']:
    rest, columns = list(gradients), []
    for layout in self.layouts:
      leaves, rest = rest[: len(layout.params)], rest[len(layout.params) :]
      columns.append(layout.apply(*(accurate(g) for g in leaves)).reshape(-1))
    return jnp.stack(columns, axis=-1)

  def from_matrix(self, v: Float[Array, 'c k']) -> list[Array]:
    rest, result = list(self.shapes), []
    for k, layout in enumerate(self.layouts):
      leaves, rest = rest[: len(layout.params)], rest[len(layout.params) :]
      result += layout.back(leaves, v[:, k].reshape(layout.shape))
    return result

  def precondition(self, v: Float[Array, 'c k'], inverses: dict[str, Array]) -> Float[Array, 'c k']:
    return (inverses['F'] * v[:, None, :]).sum(-1)  # fused: see `statistics`


def by_example(dy: Inexact[Array, 'b ...'], channels: tuple[int, ...]) -> Float[Array, 'b c']:
  """Sums over every axis but the first and the channels."""
  rest = tuple(a for a in range(1, dy.ndim) if a not in channels)
  return dy.sum(rest).reshape(dy.shape[0], -1)


def diagonal(param: int, shape: tuple[int, ...], name: str = 'diagonal') -> Unit:
  """Returns a block of one number for each entry of a parameter; its statistic is the square of a summed gradient."""
  size = math.prod(shape)
  layout = Arrangement((param,), ('flat',), lambda x: x.reshape(-1), (size,))
  return Unit(name, (layout,), (shape,))
