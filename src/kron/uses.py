"""Defines marks that state how parameters are used, where the operations do not show it.

`used` states which results of a linear operation are not padding. `copies` states that every example has a copy of a
parameter.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..program import marks
from .errors import CurvatureError


def used(x: Float[Array, '...'], where: Bool[Array, '...']) -> Float[Array, '...']:
  """Marks the input of a linear operation to tell which of its results count, as with padded sequences.

      hidden = nn.Dense(64)(kron.used(tokens, lengths[:, None, None] > jnp.arange(t)[:, None]))

  Both factors and the number of uses leave out the results that do not count; values and gradients do not change. (The
  omitted results should reach no output: their gradient is assumed to be zero.) Uses are counted for each slot, so
  experts may have different numbers of tokens.

  Args:
    x: the input of one or more linear operations, perhaps after a reshape, a transposition, a loop's slicing or a cast.
    where: a mask with the axes of `x` that broadcasts to it, with length 1 along the features. For a convolution, its
      spatial axes have the size of the result.

  Returns:
    `x`, unchanged.

  Raises:
    CurvatureError: the mask has other axes than `x`. `kron.curvature` raises it later if no linear operation reads `x`.
  """
  where = jnp.asarray(where)
  if where.ndim != jnp.ndim(x):
    raise CurvatureError(f'used: where has shape {where.shape}, x {jnp.shape(x)}; give it as many axes')
  return marks.used(jnp.asarray(x), where)


def copies(x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
  """Marks parameters that were repeated for every example and go into operations that `curvature` does not understand.

  Their curvature then comes from the gradients of each example's copy.

  Args:
    x: an array made from a parameter, whose leading axis counts examples.

  Returns:
    `x`, unchanged.
  """
  return marks.copies(x)
