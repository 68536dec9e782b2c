"""The size and meaning of one factor of a block."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact


class Factor(NamedTuple):
  """A factor of `slots` independent matrices, each kept as `parts` diagonal blocks of size n.

  size: the size of the whole matrix; `parts * n` is larger where the last block is padded.
  partner: the factor that shares the damping with this one (pi), slot by slot, if any.
  """

  slots: int
  parts: int
  n: int
  size: int
  partner: str | None = None

  @property
  def rows(self) -> int:
    """Returns the number of matrices of size n that the factor takes."""
    return self.slots * self.parts

  def __str__(self) -> str:
    text = f'{self.size}x{self.size}'
    if self.n == 1 and self.size > 1:
      text = f'diagonal of {self.size}'
    elif self.parts > 1:
      text = f'{self.parts} blocks of {self.n}x{self.n}'
    return text if self.slots == 1 else f'{self.slots} of {text}'


def whole(slots: int, size: int, partner: str | None = None) -> Factor:
  return Factor(slots, 1, size, size, partner)


def split(slots: int, size: int, largest: int, partner: str | None = None) -> Factor:
  """Returns a factor with the fewest equal diagonal blocks that are no larger than `largest`."""
  parts = -(-size // largest)
  return Factor(slots, parts, -(-size // parts), size, partner)


def accurate(x: Array) -> Array:
  """Casts x to at least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pad_rows(factor: Factor, rows: Inexact[Array, 's ... n']) -> Inexact[Array, 's ... p q']:
  """Splits the last axis into the factor's parts, padded with zeros."""
  missing = factor.parts * factor.n - factor.size
  if missing:
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
  return rows.reshape(*rows.shape[:-1], factor.parts, factor.n)


def gram(factor: Factor, rows: Inexact[Array, 's r n']) -> Float[Array, 'm q q']:
  """Sums the outer products over r, block by block, in at least f32 whatever the type of the rows.

  A complex row counts as two real ones, its real and imaginary parts: Re(r^H r).
  """
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  if factor.parts == 1:
    left = rows.conj() if jnp.iscomplexobj(rows) else rows
    if rows.shape[0] == 1:  # compilers have shorter ways for a product without a batch axis
      return lax.dot_general(left[0], rows[0], (((0,), (0,)), ((), ())), preferred_element_type=dtype).real[None]
    out = lax.dot_general(left, rows, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
    return out.real
  rows = pad_rows(factor, rows.astype(dtype))
  if factor.n == 1:
    return (jnp.abs(rows) ** 2).sum(1).reshape(-1, 1, 1)
  out = jnp.einsum('srpi,srpj->spij', rows.conj(), rows).real
  return out.reshape(-1, factor.n, factor.n)


def multiply(factor: Factor, inverse: Float[Array, 'm q q'], v: Float[Array, 's n k']) -> Float[Array, 's n k']:
  """Multiplies a matrix by the factor's inverse, slot by slot."""
  if factor.parts == 1:
    return inverse @ v
  v = jnp.swapaxes(pad_rows(factor, jnp.swapaxes(v, 1, 2)), 1, 2)  # s p k q
  inverse = inverse.reshape(factor.slots, factor.parts, factor.n, factor.n)
  out = jnp.einsum('spij,spkj->spik', inverse, v)
  return out.reshape(factor.slots, factor.parts * factor.n, -1)[:, : factor.size]


def rotate(factor: Factor, vectors: Float[Array, 'm q q'], rows: Inexact[Array, 's r n']) -> Inexact[Array, 's r n']:
  """Rotates rows into the basis of the factor's eigenvectors (the columns of `vectors`), in at least f32."""
  if factor.parts == 1:
    return accurate(rows) @ vectors
  vectors = vectors.reshape(-1, factor.parts, factor.n, factor.n)
  out = jnp.einsum('srpi,spij->srpj', pad_rows(factor, accurate(rows)), vectors)
  return out.reshape(*out.shape[:2], -1)[..., : factor.size]
