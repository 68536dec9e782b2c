"""Blocks of one small matrix for each channel: a norm's scale and shift together, either alone, or a plain diagonal.

For y = c x s + b, elementwise along the channels, the gradients of one example are ds = sum c x dy and db = sum dy over
its positions, and the block is the 2 x 2 matrix E[(ds, db)(ds, db)T] (SP-NGD, Osawa et al. 2020, section 4.2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..weights import Move, move, move_back
from .factor import Factor, accurate


class Unit(NamedTuple):
  """Scale and shift, in this order, where they are; `channels`: their axes in y, in the order of the matrix's rows."""

  has_scale: bool
  shapes: tuple[tuple[int, ...], ...]
  moves: tuple[tuple[Move, ...], ...]  # each parameter -> (channels,)
  channels: tuple[int, ...]

  @property
  def name(self) -> str:
    return 'scale and shift' if len(self.shapes) == 2 else 'scale' if self.has_scale else 'shift'

  @property
  def factors(self) -> dict[str, Factor]:
    return {'F': Factor(math.prod(self.shapes[0]), len(self.shapes), degree=2)}

  def statistics(self, x: Array, dy: Array, coefficient: Array | float) -> dict[str, Float[Array, 'c k k']]:
    """Sums over the examples (leading axis) of the outer products of their gradients, channel by channel."""
    dy = accurate(dy)
    gradients = []
    if self.has_scale:
      gradients.append(self._by_example(accurate(x) * coefficient * dy))
      coefficient = 1.0  # a shift that joins a scale is a plain one
    if len(self.shapes) > len(gradients):
      gradients.append(self._by_example(dy * coefficient))
    u = jnp.stack(gradients, axis=-1)
    return {'F': jnp.einsum('bci,bcj->cij', u, u)}

  def _by_example(self, dy: Float[Array, 'b ...']) -> Float[Array, 'b c']:
    rest = tuple(axis for axis in range(1, dy.ndim) if axis not in self.channels)
    return dy.transpose((0, *self.channels, *rest)).reshape(dy.shape[0], math.prod(self.shapes[0]), -1).sum(-1)

  def to_matrix(self, *gradients: Array) -> Float[Array, 'c k']:
    vectors = [move(moves, accurate(g)).reshape(-1) for moves, g in zip(self.moves, gradients, strict=True)]
    return jnp.stack(vectors, axis=-1)

  def from_matrix(self, v: Float[Array, 'c k']) -> tuple[Array, ...]:
    return tuple(move_back(m, shape, v[:, i]) for i, (m, shape) in enumerate(zip(self.moves, self.shapes, strict=True)))

  def precondition(self, v: Float[Array, 'c k'], inverses: dict[str, Array]) -> Float[Array, 'c k']:
    return jnp.einsum('cij,cj->ci', inverses['F'], v)


def diagonal(shape: tuple[int, ...]) -> Unit:
  """A block of one number for each entry of a parameter, whose statistic is the square of a summed gradient."""
  flatten: Move = (tuple(range(len(shape))), (math.prod(shape),))
  return Unit(False, (shape,), ((flatten,),), ())
