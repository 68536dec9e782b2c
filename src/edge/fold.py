"""Batch norms folded into integers: a multiplier, an offset and a shift for each channel.

A layer's output before rounding is rate acc + start, in levels, where acc is the integer sum. Its levels are
floor(rate acc + start + 1/2), and (multiplier acc + offset) >> shift is that with `multiplier` rounded to 8 bits and
`offset` to 16.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .activations import top
from .layers import Conv, Head, Numbers

MULTIPLIER_BITS = 8
OFFSET_BITS = 16
MOST_SHIFT = 20


class Norm(NamedTuple):
  """A batch norm by channel: scale (x - mean) / sqrt(variance + epsilon) + bias."""

  scale: Float[Array, ' outputs']
  bias: Float[Array, ' outputs']
  mean: Float[Array, ' outputs']
  variance: Float[Array, ' outputs']
  epsilon: float


def numbers(
  signs: Float[Array, 'kernel kernel _ outputs'],
  scale: Float[Array, '#outputs'],
  norm: Norm,
  conv: Conv,
  bits_in: int,
  reach: float,
) -> Numbers:
  """Folds a layer's scale and batch norm.

  Args:
    signs: the weights' signs, 0 for the zeros. scale: what a weight of 1 is worth.
    bits_in: of the layer's input, whose levels 0 ... 2^bits_in - 1 stand for 0 ... 1.
    reach: the value after the norm that the largest output level stands for.
  """
  gain = norm.scale / jnp.sqrt(norm.variance + norm.epsilon)
  rate = gain * scale / top(bits_in) * (top(conv.bits) / reach)
  start = (norm.bias - gain * norm.mean) * (top(conv.bits) / reach) + 0.5
  signs = jnp.where(rate < 0, -signs, signs)  # a negative multiplier is that of the opposite weights
  rate = jnp.abs(rate)
  most = jnp.abs(signs).sum((0, 1, 2)) * top(bits_in)
  low = -(top(conv.bits) + 1) if conv.add is not None else 0
  fixed = (most == 0) | (start - rate * most > top(conv.bits) + 1) | (start + rate * most < low)
  rate = jnp.where(fixed, 0, rate)
  start = jnp.where(fixed, jnp.clip(start, low - 1, top(conv.bits) + 1), start)
  fits = lambda x, bits: jnp.floor(jnp.log2((2.0**bits - 1) / jnp.maximum(jnp.abs(x), 1e-9)))  # noqa: E731
  shift = jnp.minimum(fits(rate, MULTIPLIER_BITS), fits(start, OFFSET_BITS - 1))
  shift = jnp.clip(shift, 0, MOST_SHIFT).astype(jnp.int32)
  unit = (1 << shift).astype(jnp.float32)
  whole = lambda x: jnp.floor(x * unit + 0.5).astype(jnp.int32)  # noqa: E731
  multiplier = jnp.minimum(whole(rate), 2**MULTIPLIER_BITS - 1)
  offset = jnp.clip(whole(start), -(2 ** (OFFSET_BITS - 1)), 2 ** (OFFSET_BITS - 1) - 1)
  return Numbers(signs.astype(jnp.int8), multiplier, offset, shift)


def head(
  weights: Float[Array, 'inputs outputs'],
  unit: Float[Array, ''],
  bias: Float[Array, ' outputs'],
  bits_in: int,
  places: int,
) -> Head:
  """Folds a head: its integers `weights`, a weight's `unit`, and the number of places that its mean is over."""
  # Few digits, so that programs that add up in another order do not differ in the last one.
  scale = (unit / (top(bits_in) * places)).astype(jnp.bfloat16).astype(jnp.float32)
  offset = jnp.floor(bias / scale + 0.5).astype(jnp.int32)
  return Head(weights.astype(jnp.int8), offset, scale)
