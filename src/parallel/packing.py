"""Packs the upper triangles of symmetric matrices into rectangles by slices alone, which halves the bytes to send.

Rows i and n - 1 - i of the triangle (i and n - i for odd n) have the same total length for every i. The lower half of
the rows, rotated by 180 degrees, therefore fills the corner that the upper half leaves empty. The code uses no index
tables, because they would be as large as the rectangle.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_shape(n: int) -> tuple[int, int]:
  """Returns (n / 2, n + 1) for even n and ((n + 1) / 2, n) for odd n, which hold n (n + 1) / 2 numbers."""
  return (n // 2, n + 1) if n % 2 == 0 else ((n + 1) // 2, n)


def fold(matrices: Float[Array, '... n n']) -> Float[Array, '... p q']:
  """Packs the upper triangles of symmetric matrices."""
  n = matrices.shape[-1]
  p, _ = packed_shape(n)
  upper = jnp.triu(matrices)
  top, bottom = upper[..., :p, :], upper[..., p:, :][..., ::-1, ::-1]
  lead = [(0, 0)] * (matrices.ndim - 2)
  if n % 2 == 0:
    return jnp.pad(top, [*lead, (0, 0), (1, 0)]) + jnp.pad(bottom, [*lead, (0, 0), (0, 1)])
  return top + jnp.pad(bottom, [*lead, (1, 0), (0, 0)])


def unfold(packed: Float[Array, '... p q'], n: int) -> Float[Array, '... n n']:
  """Restores symmetric matrices from their packed triangles; the inverse of `fold`."""
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
  """Returns the number of entries that `skew` keeps of each row."""
  return n // 2 + 1


def skew(rows: Float[Array, '... r n'], first: Int[Array, ''] | int = 0) -> Float[Array, '... r h']:
  """Packs rows of symmetric matrices: keeps the half of each row that begins at its diagonal, cyclically.

  `first` is the number of the first row. All packed rows have the same length, so a matrix that is sharded by rows can
  be packed too. The kept entries and their transposes make up the whole matrix.
  """
  *lead, r, n = rows.shape
  rows = jnp.roll(rows, -first, -1)
  # With rows of 2 n + 1 instead of 2 n, each row starts one entry further to the right than the last.
  twice = jnp.concatenate([rows, rows], -1).reshape(*lead, 2 * n * r)
  shifted = jnp.pad(twice, [(0, 0)] * len(lead) + [(0, r)]).reshape(*lead, r, 2 * n + 1)
  return shifted[..., : half_width(n)]


def unskew(half: Float[Array, '... r h'], n: int, first: Int[Array, ''] | int = 0) -> Float[Array, '... r n']:
  """Puts the entries that `skew` kept back in their places in the rows, with zeros elsewhere."""
  *lead, r, h = half.shape
  wide = jnp.pad(half, [(0, 0)] * len(lead) + [(0, 0), (0, 2 * n + 1 - h)]).reshape(*lead, r * (2 * n + 1))
  twice = wide[..., : 2 * n * r].reshape(*lead, r, 2 * n)
  return jnp.roll(twice[..., :n] + twice[..., n:], first, -1)


def kept(r: int, n: int, first: Int[Array, ''] | int = 0) -> Bool[Array, 'r n']:
  """Tells which entries `skew` keeps of the rows from number `first` on."""
  return (jnp.arange(n) - first - jnp.arange(r)[:, None]) % n < half_width(n)


def mirrored(upper: Float[Array, '... n n']) -> Float[Array, '... n n']:
  """Completes symmetric matrices from the result of `unskew` for all their rows."""
  n = upper.shape[-1]
  return jnp.where(kept(n, n), upper, jnp.swapaxes(upper, -1, -2))
