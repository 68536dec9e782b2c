"""Damped inverses of stacked factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .stacks import Layout


def slot_damping(
  layout: Layout, factors: Mapping[str, Array], damping: Float[Array, ''], replicate: Callable = lambda x: x
) -> dict[str, Array]:
  """The number added to the diagonal of each slot, (owner, slot).

  Factors A and G of one block share the damping: pi sqrt(damping) and sqrt(damping) / pi, with pi^2 the ratio of their
  mean diagonals (Martens and Grosse 2015, section 6.3). Other slots get the damping itself. `replicate`: see `Placement`.
  """
  trace = {stack: jnp.trace(x, axis1=-2, axis2=-1) / x.shape[-1] for stack, x in factors.items()}
  own = layout.group_means(trace, replicate)
  partner = own[layout.partners]
  usable = (own > 0) & (partner > 0)
  ratio = jnp.where(usable, own / jnp.where(usable, partner, 1), 1)
  paired = layout.partners != np.arange(len(layout.partners))
  added = jnp.where(paired, jnp.sqrt(damping * ratio), damping)
  return {stack: added[index].astype(factors[stack].dtype) for stack, index in layout.groups.items()}


def damped_inverse(matrices: Float[Array, 'o s n n'], damping: Float[Array, 'o s']) -> Float[Array, 'o s n n']:
  """(M + damping I)^-1 by Cholesky; NaN where that is not positive definite."""
  n = matrices.shape[-1]
  eye = jnp.eye(n, dtype=matrices.dtype)
  damped = matrices + damping[..., None, None] * eye
  if n == 1:
    return jnp.where(damped > 0, 1 / damped, jnp.nan)
  root = jnp.linalg.cholesky(damped)
  half = jax.lax.linalg.triangular_solve(root, jnp.broadcast_to(eye, damped.shape), left_side=True, lower=True)
  return jnp.swapaxes(half, -1, -2) @ half
