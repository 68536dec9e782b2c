"""Ternary weights: which are zero, and the gradient that passes straight through.

A ternary layer has a float weight w, the hidden weight, and computes with q(w) = s sign(w) where |w| > rho, else 0 (Li
et al. 2016, arXiv:1605.04711). The gradient of the loss with respect to q(w) is applied to w (Bengio et al. 2013,
arXiv:1308.3432).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

RULES = ('float', 'mean', 'share', 'learned', 'chosen')


def above_mean(weight: Float[Array, '*axes'], factor: float = 0.7) -> Bool[Array, '*axes']:
  """Keeps the weights with |w| > 0.7 mean|w| (Li et al. 2016, eq. 6), which leaves about 43 % zeros of a Gaussian."""
  return jnp.abs(weight) > factor * jnp.abs(weight).mean()


def largest(weight: Float[Array, '*axes'], zeros: Float[Array, ''] | float) -> Bool[Array, '*axes']:
  """Keeps the largest weights of a layer, so that a share `zeros` of them is zero."""
  sizes = jnp.sort(jnp.abs(weight).ravel())
  count = jnp.round(jnp.asarray(zeros) * sizes.size).astype(jnp.int32)
  return jnp.where(count > 0, jnp.abs(weight) > sizes[jnp.clip(count - 1, 0, sizes.size - 1)], True)


def ramp(step: Int[Array, ''], zeros: float, start: float, steps: int) -> Float[Array, '']:
  """Returns the share of zeros at a step: it grows from `start` to `zeros` by a cubic (Zhu and Gupta 2017, eq. 1)."""
  if not steps:
    return jnp.float32(zeros)
  left = jnp.clip(1 - step / steps, 0, 1)
  return zeros + (start - zeros) * left**3


def levels(
  weight: Float[Array, '*axes outputs'], kept: Bool[Array, '*axes outputs'], per_channel: bool = True
) -> tuple[Float[Array, '*axes outputs'], Float[Array, '#outputs']]:
  """Returns the signs of the kept weights, 0 for the others, and the scale s that fits the weight best.

  s is the mean of |w| over the kept weights (Li et al. 2016, eq. 4), of each output channel or of the layer.
  """
  axes = tuple(range(weight.ndim - 1)) if per_channel else None
  signs = jnp.where(kept, jnp.sign(weight), 0)
  count = jnp.maximum(kept.sum(axes), 1)
  scale = jnp.atleast_1d((jnp.abs(weight) * kept).sum(axes) / count)
  return signs, jnp.where(scale > 0, scale, 1.0)


def straight_through(weight: Float[Array, '*axes'], value: Float[Array, '*axes']) -> Float[Array, '*axes']:
  """Returns `value` with the gradient of `weight`. `kron` reads it as the weight, with the factors of the value."""
  return weight + jax.lax.stop_gradient(value - weight)


def learned(
  weight: Float[Array, '*axes outputs'], rho: Float[Array, '']
) -> tuple[Bool[Array, '*axes outputs'], Float[Array, '*axes outputs']]:
  """Returns the weights kept by a learned threshold, |w| > rho mean|w|, and a term that has its gradient.

  The term is zero. Its derivative with respect to rho is -s sign(w) mean|w| on a triangle around the threshold, the slope
  of a step smoothed over half the mean.
  """
  mean = jnp.abs(weight).mean()
  size = jax.lax.stop_gradient(jnp.abs(weight) / mean)
  near = jnp.maximum(0, 1 - 2 * jnp.abs(size - jax.lax.stop_gradient(rho))) * 2
  slope = jax.lax.stop_gradient(-near * jnp.sign(weight) * mean)
  return size > jax.lax.stop_gradient(rho), slope * (rho - jax.lax.stop_gradient(rho))
