"""The size and meaning of one factor of a block."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Factor(NamedTuple):
  """`slots` symmetric matrices of size n.

  degree: how the statistic grows with the loss's gradient, 0 or 2. A statistic of degree 0 is averaged over the uses of
  the parameter, one of degree 2 over the observations.
  partner: the factor it shares the damping with (pi), if any.
  """

  slots: int
  n: int
  degree: int
  partner: str | None = None


def accurate(x: Array) -> Array:
  """At least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
