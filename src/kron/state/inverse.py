"""Damped inverses of stacked factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .stacks import Layout

_LARGE = 1024  # larger matrices are inverted by halves; smaller ones would gain less than the compilation costs


def slot_damping(
  layout: Layout, factors: Mapping[str, Array], damping: Float[Array, ''], replicate: Callable = lambda x: x
) -> dict[str, Array]:
  """Returns the number to add to the diagonal of each slot, (owner, slot).

  Factors A and G of one block share the damping: pi sqrt(damping) and sqrt(damping) / pi, with pi^2 the ratio of their
  mean diagonals (Martens and Grosse 2015, section 6.3). Other slots get the damping itself. See `Placement.replicate`.
  """
  means = layout.mean_diagonals(factors, replicate)
  partner = means[layout.partners]
  usable = (means > 0) & (partner > 0)
  # Take the roots one by one: with small or large losses, products and quotients would leave the range of float32.
  pi = jnp.where(usable, jnp.sqrt(means) / jnp.sqrt(jnp.where(usable, partner, 1)), 1)
  paired = layout.partners != np.arange(len(layout.partners))
  added = jnp.where(paired, jnp.sqrt(damping) * pi, damping)
  return {stack: added[index].astype(factors[stack].dtype) for stack, index in layout.wholes.items()}


def damped_inverse(matrices: Float[Array, 'o s n n'], damping: Float[Array, 'o s']) -> Float[Array, 'o s n n']:
  """Computes (M + damping I)^-1 by Cholesky's factorisation; NaN where M + damping I is not positive definite."""
  n = matrices.shape[-1]
  damped = matrices + damping[..., None, None] * jnp.eye(n, dtype=matrices.dtype)
  return jnp.where(damped > 0, 1 / damped, jnp.nan) if n == 1 else spd_inverse(damped)


def sure_inverse(
  matrices: Float[Array, 'o s n n'],
  damping: Float[Array, 'o s'],
  wanted: Bool[Array, 'o s'],
  old: Float[Array, 'o s n n'],
) -> tuple[Float[Array, 'o s n n'], Bool[Array, 'o s'], Bool[Array, 'o s']]:
  """Computes `damped_inverse` where it is wanted, and tries again with more damping where it fails.

  Each further try multiplies the damping by ten, up to 10^4 times the damping.

  Returns:
    The inverses, with the old ones where all tries fail or none is wanted; which failed; which have more damping.
  """

  def unfinished(carry):
    _, failed, _, tries = carry
    return failed.any() & (tries < 5)

  def again(carry):
    held, failed, times, tries = carry
    new = damped_inverse(matrices, damping * times)
    done = failed & jnp.isfinite(new).all((-1, -2))
    held = jnp.where(done[..., None, None], new, held)
    failed &= ~done
    return held, failed, jnp.where(failed, 10 * times, times), tries + 1

  # The first try is inside of the loop, so that the inverse is compiled only once.
  held, failed, times, _ = jax.lax.while_loop(unfinished, again, (old, wanted, jnp.ones_like(damping), 0))
  return held, failed, (times > 1) & ~failed


def split_inverse(
  rows: Float[Array, '1 s r n'], damping: Float[Array, '1 s'], axes: tuple[str, ...]
) -> Float[Array, '1 s r n']:
  """Computes a device's rows of (M + damping I)^-1, if every device along the mesh axes has r rows of M.

  Call it inside of shard_map. It runs block Gauss-Jordan elimination, without pivoting because M is positive definite
  (Higham 2002, section 14.4). One device after another sends its rows to all devices, and all devices eliminate with
  these rows. This takes 4 n^2 r operations on each device and sends n^2 numbers in all. All rows are NaN where M is not
  positive definite.
  """
  _, slots, r, n = rows.shape
  devices, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  wide = devices * r
  local = jnp.pad(rows[0], ((0, 0), (0, 0), (0, wide - n)))
  diagonal = (me * r + jnp.arange(r))[:, None] == jnp.arange(wide)
  beyond = jnp.arange(wide) >= n  # rows that pad the last device's share
  local = jnp.where(diagonal, jnp.where(beyond, 1, local + damping[0][:, None, None]), local)

  def eliminate(k, local):
    at = (0, 0, k * r)
    panel = jax.lax.psum(jnp.where(me == k, local, 0), axes)
    pivot = jax.lax.dynamic_slice(panel, at, (slots, r, r))
    column = jax.lax.dynamic_slice(local, at, (slots, r, r))
    eye = jnp.broadcast_to(jnp.eye(r, dtype=rows.dtype), pivot.shape)
    scaled = _product(spd_inverse(pivot), jax.lax.dynamic_update_slice(panel, eye, at))
    others = jax.lax.dynamic_update_slice(local, jnp.zeros_like(column), at) - _product(column, scaled)
    return jnp.where(me == k, scaled, others)

  return jax.lax.fori_loop(0, devices, eliminate, local)[None, :, :, :n]


def spd_inverse(m: Float[Array, '... n n']) -> Float[Array, '... n n']:
  """Inverts a positive definite matrix; the result is NaN where the matrix is not positive definite.

  Large matrices are inverted by halves. With M = [A B; B^T D] and the Schur complement S = D - B^T A^-1 B, both
  positive definite, the inverse is [A^-1 + W S^-1 W^T, -W S^-1; ., S^-1], W = A^-1 B (Higham 2002, section 14.4). That
  takes two inverses of half the size, and n^3 / 2 multiplications, all in matrix products. Inversion through the
  Cholesky factor takes 5/3 n^3 multiplications, most of them in a triangular solve and in a product that cannot exploit
  the triangles.
  """
  n = m.shape[-1]
  if n <= _LARGE:
    return _cholesky_inverse(m)
  h = n // 2
  a, b, d = m[..., :h, :h], m[..., :h, h:], m[..., h:, h:]
  transposed = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731
  a = spd_inverse(a)
  w = _product(a, b)
  s = spd_inverse(d - _product(transposed(b), w))
  ws = _product(w, s)
  top = jnp.concatenate([a + _product(ws, transposed(w)), -ws], -1)
  return jnp.concatenate([top, jnp.concatenate([-transposed(ws), s], -1)], -2)


def _product(x: Array, y: Array) -> Array:
  """Multiplies matrices in full precision; half precision could make small eigenvalues of an inverse negative."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _cholesky_inverse(m: Float[Array, '... n n']) -> Float[Array, '... n n']:
  root = jnp.linalg.cholesky(m)
  eye = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
  half = jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
  return _product(jnp.swapaxes(half, -1, -2), half)
