"""A network of integers as a JAX program: sums in float32, where they are exact, and int32 for all else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .activations import top
from .layers import Conv, Head, Network, Numbers, Plan, padding

LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def forward(network: Network, pixels: Float[Array, 'b height width channels']) -> Int[Array, 'b *place outputs']:
  """Computes a network's outputs in JAX, equal to those of `streams`.

  Args:
    network: the network.
    pixels: images in [0, 1], (b, height, width, channels).

  Returns:
    The head's sums as int32, (b, outputs), or (b, height, width, outputs) with `plan.by_place`; times
    `network.head.scale` they are the logits.
  """
  return levels(network.plan, network.layers, network.head, quantised(pixels, network.plan.bits))


def levels(
  plan: Plan, layers: tuple[Numbers, ...], head: Head, x: Int[Array, 'b height width channels']
) -> Int[Array, 'b *place outputs']:
  """Computes the head's sums of the input's levels."""
  values = [x]
  for conv, numbers in zip(plan.convs, layers, strict=True):
    values.append(layer(values[-1], conv, numbers, None if conv.add is None else values[conv.add]))
  return head_sums(plan, head, values[-1])


def quantised(pixels: Float[Array, '*axes'], bits: int) -> Int[Array, '*axes']:
  """Returns the levels of pixels in [0, 1]: floor(x (2^bits - 1) + 1/2)."""
  # The barrier keeps XLA from fusing the product into the sum, which would round once where NumPy rounds twice.
  scaled = jax.lax.optimization_barrier(jnp.clip(pixels, 0, 1).astype(jnp.float32) * top(bits))
  return jnp.floor(scaled + 0.5).astype(jnp.int32)


def layer(
  x: Int[Array, 'b height width inputs'], conv: Conv, numbers: Numbers, added: Int[Array, '...'] | None = None
) -> Int[Array, 'b rows columns outputs']:
  """Computes one layer from the levels of its input, and of the stream that is added, if there is one."""
  acc = sums(x.astype(jnp.float32), conv, jnp.asarray(numbers.weights).astype(jnp.float32)).astype(jnp.int32)
  whole = lambda n: jnp.asarray(n).astype(jnp.int32)  # noqa: E731
  z = (whole(numbers.multiplier) * acc + whole(numbers.offset)) >> whole(numbers.shift)
  most = top(conv.bits)
  y = jnp.clip(z, 0, most) if added is None else jnp.clip(jnp.clip(z, -most - 1, most) + added, 0, most)
  return pooled(y, conv.pool)


def sums(
  x: Float[Array, 'b height width inputs'], conv: Conv, weights: Float[Array, 'kernel kernel _ outputs']
) -> Float[Array, 'b rows columns outputs']:
  """Computes a layer's convolution, with zeros around the image."""
  around = [(padding(conv),) * 2] * 2
  groups = conv.width if conv.depthwise else 1
  return jax.lax.conv_general_dilated(
    x, weights, (conv.stride,) * 2, around, dimension_numbers=LAYOUT, feature_group_count=groups
  )


def pooled(y: Array, side: int) -> Array:
  """Returns the maximum over side x side places; rows and columns that fill no such place are left out."""
  if side == 1:
    return y
  b, height, width, channels = y.shape
  y = y[:, : height // side * side, : width // side * side]
  return y.reshape(b, height // side, side, width // side, side, channels).max((2, 4))


def head_sums(plan: Plan, head: Head, x: Int[Array, 'b height width inputs']) -> Int[Array, 'b *place outputs']:
  """Computes the head's sums from the levels of the last stream."""
  x = x if plan.by_place else x.sum((1, 2))
  # In float32 a product of matrices is exact here and fast; see `layers.check`.
  product = jnp.matmul(x.astype(jnp.float32), jnp.asarray(head.weights).astype(jnp.float32), precision='highest')
  return product.astype(jnp.int32) + jnp.asarray(head.offset).astype(jnp.int32)
