"""Arithmetic on trees shaped like the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def dot(a: PyTree, b: PyTree) -> Float[Array, '']:
  return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)), start=jnp.zeros(()))


def add(a: PyTree, scale: Any, b: PyTree) -> PyTree:
  """Returns a + scale b."""
  return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y, a, b)
