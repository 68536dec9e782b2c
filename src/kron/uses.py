"""Marks that say how parameters are used, where operations do not: which results of a linear operation are no padding, and
that every example has a copy.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..program import marks
from .errors import CurvatureError


def used(x: Float[Array, '...'], where: Bool[Array, '...']) -> Float[Array, '...']:
  """Marks the input of a linear operation of which only some results count, as of padded sequences.

      hidden = nn.Dense(64)(kron.used(tokens, lengths[:, None, None] > jnp.arange(t)[:, None]))

  Both factors, and the number of uses, leave out the results that do not count; values and gradients do not change. (What
  is left out should reach no output: its gradient is taken for zero.) Uses are counted for each slot, so experts may have
  different numbers of tokens.

  Args:
    x: read by one or more linear operations next, perhaps after it was reshaped, transposed, sliced by a loop or cast.
    where: has the axes of `x` and broadcasts to it; its features have length 1. For a convolution it has the size of the
      result along the axes of space.

  Returns:
    `x`, unchanged.

  Raises:
    CurvatureError: the mask has other axes than `x`; later, from `kron.curvature`: no linear operation reads `x`.
  """
  where = jnp.asarray(where)
  if where.ndim != jnp.ndim(x):
    raise CurvatureError(f'used: where has shape {where.shape}, x {jnp.shape(x)}; give it as many axes')
  return marks.used(jnp.asarray(x), where)


def copies(x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
  """Marks parameters that were repeated for every example and are read by what `curvature` does not understand.

  Their curvature is then that of the gradients of each example's copy.

  Args:
    x: made of a parameter; leads with examples.

  Returns:
    `x`, unchanged.
  """
  return marks.copies(x)
