"""Symmetric matrices as rectangles of their upper triangles: half the bytes to send, by slices alone.

Row i of the triangle and row n - 1 - i (or n - i, for odd n) together are as long as any other such pair, so the lower half
of the rows, turned round, fills the corner that the upper half leaves. No index tables: they would be as large as it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_shape(n: int) -> tuple[int, int]:
  """(n / 2, n + 1) for even n, ((n + 1) / 2, n) for odd: n (n + 1) / 2 numbers."""
  return (n // 2, n + 1) if n % 2 == 0 else ((n + 1) // 2, n)


def fold(matrices: Float[Array, '... n n']) -> Float[Array, '... p q']:
  """The upper triangles of symmetric matrices."""
  n = matrices.shape[-1]
  p, _ = packed_shape(n)
  upper = jnp.triu(matrices)
  top, bottom = upper[..., :p, :], upper[..., p:, :][..., ::-1, ::-1]
  lead = [(0, 0)] * (matrices.ndim - 2)
  if n % 2 == 0:
    return jnp.pad(top, [*lead, (0, 0), (1, 0)]) + jnp.pad(bottom, [*lead, (0, 0), (0, 1)])
  return top + jnp.pad(bottom, [*lead, (1, 0), (0, 0)])


def unfold(packed: Float[Array, '... p q'], n: int) -> Float[Array, '... n n']:
  """The inverse of `fold`."""
  p, q = packed_shape(n)
  i, j = jnp.arange(p)[:, None], jnp.arange(q)
  shift = q - n
  top = jnp.where(j >= i + shift, packed, 0)[..., :, shift:]
  bottom = jnp.where(j < i + shift, packed, 0)[..., :, :n]
  bottom = bottom[..., p - (n - p) :, :]  # for odd n the first row has no partner
  upper = jnp.concatenate([top, bottom[..., ::-1, ::-1]], -2)
  diagonal = jnp.eye(n, dtype=bool)
  return upper + jnp.where(diagonal, 0, jnp.swapaxes(upper, -1, -2))


def half_width(n: int) -> int:
  """How many numbers of each row `skew` keeps."""
  return n // 2 + 1


def skew(rows: Float[Array, '... r n'], first: Int[Array, ''] | int = 0) -> Float[Array, '... r h']:
  """Of rows number `first` on of symmetric matrices: each from its diagonal on, round the end, half way.

  All rows are equally long, so that a matrix divided by rows is packed too: between this and its transpose nothing is lost.
  """
  *lead, r, n = rows.shape
  rows = jnp.roll(rows, -first, -1)
  # A row of 2 n + 1 in place of 2 n starts one further to the right than the last.
  twice = jnp.concatenate([rows, rows], -1).reshape(*lead, 2 * n * r)
  shifted = jnp.pad(twice, [(0, 0)] * len(lead) + [(0, r)]).reshape(*lead, r, 2 * n + 1)
  return shifted[..., : half_width(n)]


def unskew(half: Float[Array, '... r h'], n: int, first: Int[Array, ''] | int = 0) -> Float[Array, '... r n']:
  """Rows with what `skew` kept in its place, and zeros elsewhere."""
  *lead, r, h = half.shape
  wide = jnp.pad(half, [(0, 0)] * len(lead) + [(0, 0), (0, 2 * n + 1 - h)]).reshape(*lead, r * (2 * n + 1))
  twice = wide[..., : 2 * n * r].reshape(*lead, r, 2 * n)
  return jnp.roll(twice[..., :n] + twice[..., n:], first, -1)


def kept(r: int, n: int, first: Int[Array, ''] | int = 0) -> Bool[Array, 'r n']:
  """Which entries of rows number `first` on `skew` keeps."""
  return (jnp.arange(n) - first - jnp.arange(r)[:, None]) % n < half_width(n)


def mirrored(upper: Float[Array, '... n n']) -> Float[Array, '... n n']:
  """Whole symmetric matrices from what `unskew` returned of all their rows."""
  n = upper.shape[-1]
  return jnp.where(kept(n, n), upper, jnp.swapaxes(upper, -1, -2))
