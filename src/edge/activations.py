"""Activations of a few bits: clipped and rounded, with the gradient that passes straight through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def top(bits: int) -> int:
  """Returns the largest level of an activation, 2^bits - 1; the levels are 0, 1, ..., 2^bits - 1."""
  return 2**bits - 1


def rounded(x: Float[Array, '*axes'], bits: int) -> Float[Array, '*axes']:
  """Clips to [0, 1] and rounds to the levels i / (2^bits - 1); the gradient is that of the clipping alone.

  Halves round up, as an adder and a shift do.
  """
  x = jnp.clip(x, 0, 1)
  return x + jax.lax.stop_gradient(jnp.floor(x * top(bits) + 0.5) / top(bits) - x)


def signed(x: Float[Array, '*axes'], bits: int) -> Float[Array, '*axes']:
  """Rounds as `rounded`, but clips to [-1 - 1 / (2^bits - 1), 1]: what a layer adds to its input may be negative."""
  low = -(top(bits) + 1) / top(bits)
  x = jnp.clip(x, low, 1)
  return x + jax.lax.stop_gradient(jnp.floor(x * top(bits) + 0.5) / top(bits) - x)
