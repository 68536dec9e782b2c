"""Damped inverses of stacked factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .stacks import Layout

INVERSES = ('cholesky', 'eigh', 'newton_schulz')


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


def damped_inverse(
  matrices: Float[Array, 'o s n n'],
  damping: Float[Array, 'o s'],
  method: str = 'cholesky',
  old: Float[Array, 'o s n n'] | None = None,
) -> Float[Array, 'o s n n']:
  """(M + damping I)^-1 by one of `INVERSES`; NaN where that fails: not positive definite, or no convergence.

  'cholesky': the cheapest that is exact.
  'eigh': dear; eigenvalues below zero (rounding) count as zero.
  'newton_schulz': X <- X (2 I - M X) from `old`, products alone (Higham 2008, eq. 5.22 for the inverse; Ben-Israel 1965).
  """
  n = matrices.shape[-1]
  eye = jnp.eye(n, dtype=matrices.dtype)
  damped = matrices + damping[..., None, None] * eye
  if n == 1:
    return jnp.where(damped > 0, 1 / damped, jnp.nan)
  if method == 'eigh':
    values, vectors = jnp.linalg.eigh(matrices)
    values = jnp.maximum(values, 0) + damping[..., None]
    return (vectors / values[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
  if method == 'newton_schulz':
    return _newton_schulz(damped, jnp.zeros_like(damped) if old is None else old)
  root = jnp.linalg.cholesky(damped)
  half = jax.lax.linalg.triangular_solve(root, jnp.broadcast_to(eye, damped.shape), left_side=True, lower=True)
  return jnp.swapaxes(half, -1, -2) @ half


def _newton_schulz(m: Float[Array, 'o s n n'], old: Float[Array, 'o s n n']) -> Float[Array, 'o s n n']:
  """From `old` where that is near enough to converge, from a multiple of I elsewhere.

  A slot is done when |I - M X| is below 1e-4 of |I|, or below what rounding allows (it no longer shrinks).
  """
  n = m.shape[-1]
  eye = jnp.eye(n, dtype=m.dtype)
  norm = lambda x: jnp.sqrt((x * x).sum((-1, -2)))  # noqa: E731
  apart = lambda x: eye - m @ x  # noqa: E731
  cold = eye / norm(m)[..., None, None]
  r_old = apart(old)
  warm = (norm(r_old) < 0.9)[..., None, None]  # the spectral norm is no larger
  x = jnp.where(warm, old, cold)

  def unfinished(carry):
    _, _, going, i = carry
    return going.any() & (i < 60)

  def step(carry):
    x, r, going, i = carry
    new = x + x @ r
    new_r = apart(new)
    # Far from the solution the norm may stay level while the spectral norm falls; near it, shrinking stops at rounding.
    better = (norm(new_r) < norm(r)) | (norm(r) > 0.5)
    keep = (going & better)[..., None, None]
    x, r = jnp.where(keep, new, x), jnp.where(keep, new_r, r)
    return x, r, going & better & (norm(r) > 1e-4 * n**0.5), i + 1

  r = jnp.where(warm, r_old, apart(cold))
  x, r, _, _ = jax.lax.while_loop(unfinished, step, (x, r, norm(r) > 1e-4 * n**0.5, 0))
  return jnp.where((norm(r) < 0.1 * n**0.5)[..., None, None], x, jnp.nan)
