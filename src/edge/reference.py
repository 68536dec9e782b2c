"""The reference: a network of integers computed by NumPy, in integers alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, UInt8

from .activations import top
from .layers import Conv, Network, Numbers, bits_of, padding


def streams(
  network: Network, levels: UInt8[np.ndarray, 'b height width channels']
) -> list[Int[np.ndarray, 'b *place channels']]:
  """Computes every stream of a network by NumPy, in integers alone.

  Args:
    network: the network.
    levels: the input's levels, 0 ... 2^bits - 1, (b, height, width, channels), as `edge.reference.quantised` returns
      them.

  Returns:
    The input, each layer's output, and at last the head's sums, as int32.
  """
  values = [np.asarray(levels, np.int32)]
  for conv, numbers in zip(network.plan.convs, network.layers, strict=True):
    added = None if conv.add is None else values[conv.add]
    values.append(_layer(values[-1], conv, numbers, added))
  x = values[-1] if network.plan.by_place else values[-1].sum((1, 2), dtype=np.int32)
  values.append(x @ network.head.weights.astype(np.int32) + network.head.offset.astype(np.int32))
  return values


def quantised(pixels: np.ndarray, bits: int) -> UInt8[np.ndarray, '...']:
  """Returns the levels of pixels in [0, 1]: floor(x (2^bits - 1) + 1/2), in float32, as the networks compute it."""
  scaled = np.clip(np.asarray(pixels, np.float32), 0, 1) * np.float32(top(bits)) + np.float32(0.5)
  return np.floor(scaled).astype(np.uint8)


def _layer(x: np.ndarray, conv: Conv, numbers: Numbers, added: np.ndarray | None) -> np.ndarray:
  acc = _sums(x, conv, numbers.weights.astype(np.int32))
  z = (numbers.multiplier.astype(np.int32) * acc + numbers.offset.astype(np.int32)) >> numbers.shift.astype(np.int32)
  most = top(conv.bits)
  y = np.clip(z, 0, most) if added is None else np.clip(np.clip(z, -most - 1, most) + added, 0, most)
  b, height, width, channels = y.shape
  p = conv.pool
  y = y[:, : height // p * p, : width // p * p].reshape(b, height // p, p, width // p, p, channels)
  return y.max((2, 4))


def _sums(x: np.ndarray, conv: Conv, weights: np.ndarray) -> np.ndarray:
  """Returns the sums (b, height, width, outputs) of a layer's windows."""
  around = padding(conv)
  x = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (conv.kernel, conv.kernel), (1, 2))
  windows = windows[:, :: conv.stride, :: conv.stride]  # b, height, width, channels, row, column
  spec = 'bhwcij,ijxc->bhwc' if conv.depthwise else 'bhwcij,ijco->bhwo'
  return np.einsum(spec, windows, weights, optimize=True).astype(np.int32)


def logits(network: Network, sums: Int[np.ndarray, 'b *place outputs']) -> np.ndarray:
  """Returns the logits of the head's sums, in float32."""
  return sums.astype(np.float32) * np.float32(network.head.scale)


def stream_bits(network: Network) -> list[int]:
  """Returns the bits of each stream that `streams` returns, except the head's sums."""
  return [bits_of(network.plan, i) for i in range(len(network.layers) + 1)]
