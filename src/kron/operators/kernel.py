"""Functions shared by all blocks of a kernel (slots, rows, columns), however they approximate its curvature.

A block here is a `Kronecker` or a `Unitwise`. It has the layouts `kernel` and `bias`, their `shapes`, the `loops` that
slice them, and `reduced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ..statistics import BlockSums
from .conv import Conv
from .dense import Dense
from .embedding import Embedding
from .factor import accurate

Linear = Dense | Conv | Embedding
SHARING = ('expand', 'reduce')
"""Lists the choices of `sharing=` in `curvature`, for kernels that an example uses several times.

'expand' treats the uses as independent, 'reduce' sums over them first (Eschenhagen et al. 2023).
"""
APPROXIMATIONS = ('kronecker', 'unit', 'diagonal')


class Side(NamedTuple):
  """The coefficient and the mask of a site, which its operands do not show.

  scale, rows, columns: the weight's coefficient, as a number and as arrays along the rows or columns of its matrix.
  where: 1 for each use that counts, else 0 (`kron.used`).
  """

  scale: float = 1.0
  rows: Inexact[Array, 's i'] | None = None
  columns: Float[Array, 's o'] | None = None
  where: Float[Array, 's b r 1'] | None = None


def sides(
  block: Any,
  a: Inexact[Array, 's b r i'],
  g: Inexact[Array, 's b r o'],
  coefficient: Side,
  bias: bool,
  transposed: bool,
) -> tuple[Inexact[Array, 's b r _'], Inexact[Array, 's b r _']]:
  """Applies the weight's coefficient to the rows, and appends the bias's input: one where it is added, else zero."""
  a, g = scaled(a, coefficient.rows) * coefficient.scale, scaled(g, coefficient.columns)
  if block.bias is not None and transposed:
    g = jnp.concatenate([g, jnp.zeros((*g.shape[:-1], 1), g.dtype)], -1)
  elif block.bias is not None:
    a = jnp.concatenate([a, jnp.full((*a.shape[:-1], 1), float(bias), a.dtype)], -1)
  if coefficient.where is not None:
    a, g = (rows * coefficient.where.astype(rows.dtype) for rows in (a, g))
  return a, g


def scaled(rows: Inexact[Array, 's b r n'], by: Float[Array, 's n'] | None) -> Inexact[Array, 's b r n']:
  return rows if by is None else rows * by[:, None, None].astype(rows.dtype)


def flat(rows: Inexact[Array, 's b r n']) -> Inexact[Array, 's k n']:
  return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def uses_of(g: Inexact[Array, 's b r o'], where: Float[Array, 's b r 1'] | None = None) -> Float[Array, ' s']:
  """Returns the number of rows that count in each slot; complex rows count twice, see `gram`."""
  rows = jnp.full(g.shape[0], g.shape[1] * g.shape[2], jnp.float32) if where is None else where.sum((1, 2, 3))
  return rows * (2 if jnp.iscomplexobj(g) else 1)


def means_over_uses(
  block: Any, sums: BlockSums
) -> tuple[Inexact[Array, 's b i'], Inexact[Array, 's b o'], Float[Array, ' s']]:
  """Returns, for *reduce*, each example's mean a, its summed g, and how often each example used the kernel."""
  each, a = jnp.maximum(sums.uses['A'].reshape(-1) / block.reduced, 1), sums.products['A']
  return a / each[:, None, None].astype(a.dtype), sums.products['G'], each


def to_matrix(block: Any, gradients: Sequence[Array]) -> Float[Array, 's i o']:
  """Joins the gradients of kernel and bias into one matrix, whose last row is the bias."""
  n = len(block.kernel.params)
  v = block.kernel.apply(*(accurate(g) for g in gradients[:n]))
  if block.bias is not None:
    b = block.bias.apply(*(accurate(g) for g in gradients[n:]))
    v = jnp.concatenate([v, b[:, None, :]], 1)
  return v


def from_matrix(block: Any, v: Float[Array, 's i o']) -> list[Array]:
  """Applies the transpose of `to_matrix`."""
  n = len(block.kernel.params)
  if block.bias is None:
    return block.kernel.back(block.shapes, v)
  return block.kernel.back(block.shapes[:n], v[:, :-1]) + block.bias.back(block.shapes[n:], v[:, -1])
