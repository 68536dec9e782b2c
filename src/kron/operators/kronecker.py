"""Blocks with two factors, F = A x G: a kernel with, perhaps, the bias added to its result.

With rows a of the input (a one appended where there is a bias) and g of the loss's gradient at the output,
A = E[a aT] over all uses of the kernel and G = E[sum over an example's uses of g gT]: K-FAC *expand* (Martens and Grosse
2015, eq. 1; Eschenhagen et al. 2023, eq. 12). The update of the gradient matrix V is A^-1 V G^-1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..weights import Move, move, move_back
from .conv import Conv
from .dense import Dense
from .factor import Factor, accurate


class Kronecker(NamedTuple):
  """The block of one linear operator; `bias_moves` is None without a bias."""

  linear: Dense | Conv
  kernel_shape: tuple[int, ...]
  bias_shape: tuple[int, ...]
  bias_moves: tuple[Move, ...] | None

  @property
  def name(self) -> str:
    return self.linear.name

  @property
  def factors(self) -> dict[str, Factor]:
    n = self.linear.n_in + (self.bias_moves is not None)
    return {'A': Factor(1, n, degree=0, partner='G'), 'G': Factor(1, self.linear.n_out, degree=2, partner='A')}

  def uses(self, dy_shape: tuple[int, ...]) -> int:
    """How many rows `statistics` sums over."""
    return math.prod(dy_shape) // self.linear.n_out

  def statistics(self, x: Array, dy: Array, coefficient: Array | float) -> dict[str, Float[Array, '1 n n']]:
    """Sums of a aT and g gT over the rows of one batch."""
    del coefficient
    rows = self.linear.input_rows(x)
    a = _gram(rows) * self.linear.scale**2
    if self.bias_moves is not None:
      ones = rows.sum(0, dtype=a.dtype, keepdims=True) * self.linear.scale
      count = jnp.full((1, 1), rows.shape[0], a.dtype)
      a = jnp.block([[a, ones.T], [ones, count]])
    return {'A': a[None], 'G': _gram(self.linear.output_rows(dy))[None]}

  def to_matrix(self, kernel: Array, bias: Array | None = None) -> Float[Array, 'n_in n_out']:
    v = move(self.linear.kernel_moves, accurate(kernel))
    if bias is not None:
      v = jnp.concatenate([v, move(self.bias_moves, accurate(bias)).reshape(1, -1)])
    return v

  def from_matrix(self, v: Float[Array, 'n_in n_out']) -> tuple[Array, ...]:
    kernel = move_back(self.linear.kernel_moves, self.kernel_shape, v[: self.linear.n_in])
    if self.bias_moves is None:
      return (kernel,)
    return kernel, move_back(self.bias_moves, self.bias_shape, v[-1])

  def precondition(self, v: Float[Array, 'n_in n_out'], inverses: dict[str, Array]) -> Float[Array, 'n_in n_out']:
    return inverses['A'][0] @ v @ inverses['G'][0]


def _gram(rows: Float[Array, 'rows n']) -> Float[Array, 'n n']:
  """rowsT rows, summed in at least f32 whatever the rows' type."""
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  return lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
