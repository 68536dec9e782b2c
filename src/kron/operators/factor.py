"""The size and meaning of one factor of a block."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Factor(NamedTuple):
  """`slots` independent matrices, each kept as `parts` diagonal blocks of size n.

  size: of the whole matrix; `parts * n` is larger where the last block is filled up.
  partner: the factor it shares the damping with (pi), if any; slot by slot.
  """

  slots: int
  parts: int
  n: int
  size: int
  partner: str | None = None

  @property
  def rows(self) -> int:
    """How many matrices of size n it takes."""
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
  """The fewest equal diagonal blocks that are no larger than `largest`."""
  parts = -(-size // largest)
  return Factor(slots, parts, -(-size // parts), size, partner)


def accurate(x: Array) -> Array:
  """At least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pad_rows(factor: Factor, rows: Float[Array, 's ... n']) -> Float[Array, 's ... p q']:
  """The last axis cut into the factor's parts."""
  missing = factor.parts * factor.n - factor.size
  if missing:
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
  return rows.reshape(*rows.shape[:-1], factor.parts, factor.n)


def gram(factor: Factor, rows: Float[Array, 's r n']) -> Float[Array, 'm q q']:
  """Sum over r of outer products, block by block, in at least f32 whatever the rows' type.

  Complex rows count as two real ones, their real and imaginary parts: Re(r^H r).
  """
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  if factor.parts == 1:
    left = rows.conj() if jnp.iscomplexobj(rows) else rows
    if rows.shape[0] == 1:  # a product without a batch axis, for which compilers have shorter ways
      return lax.dot_general(left[0], rows[0], (((0,), (0,)), ((), ())), preferred_element_type=dtype).real[None]
    out = lax.dot_general(left, rows, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
    return out.real
  rows = pad_rows(factor, rows.astype(dtype))
  if factor.n == 1:
    return (jnp.abs(rows) ** 2).sum(1).reshape(-1, 1, 1)
  out = jnp.einsum('srpi,srpj->spij', rows.conj(), rows).real
  return out.reshape(-1, factor.n, factor.n)


def multiply(factor: Factor, inverse: Float[Array, 'm q q'], v: Float[Array, 's n k']) -> Float[Array, 's n k']:
  """The factor's inverse times a matrix, slot by slot."""
  if factor.parts == 1:
    return inverse @ v
  v = jnp.swapaxes(pad_rows(factor, jnp.swapaxes(v, 1, 2)), 1, 2)  # s p k q
  inverse = inverse.reshape(factor.slots, factor.parts, factor.n, factor.n)
  out = jnp.einsum('spij,spkj->spik', inverse, v)
  return out.reshape(factor.slots, factor.parts * factor.n, -1)[:, : factor.size]


def rotate(factor: Factor, vectors: Float[Array, 'm q q'], rows: Float[Array, 's r n']) -> Float[Array, 's r n']:
  """Rows in the basis of the factor's eigenvectors (its columns), at least f32."""
  if factor.parts == 1:
    return accurate(rows) @ vectors
  vectors = vectors.reshape(-1, factor.parts, factor.n, factor.n)
  out = jnp.einsum('srpi,spij->srpj', pad_rows(factor, accurate(rows)), vectors)
  return out.reshape(*out.shape[:2], -1)[..., : factor.size]
