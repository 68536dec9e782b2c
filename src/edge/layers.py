"""The network of integers: its layers, their numbers, and the bounds of their sums.

The input and all activations are levels 0 ... 2^bits - 1. A layer computes

  acc  = sum of w x over its window, w in {-1, 0, 1}, with x = 0 around the image
  z    = (multiplier acc + offset) >> shift, by channel
  y    = clip(z, 0, 2^bits - 1), or clip(z, -2^bits, 2^bits - 1) + an earlier stream, then clipped to 0 ... 2^bits - 1
  out  = max of y over pool x pool places

and the head sums (w x) over all places and adds an offset, or does so at every place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8

from .activations import top
from .errors import EdgeError

MOST_PRODUCT = 2**31 - 1  # what an int32 holds
MOST_EXACT = 2**24  # up to here float32 holds all integers, so a sum in float32 is exact


class Conv(NamedTuple):
  """Describes the shape of a layer.

  Attributes:
    width: the number of output channels.
    kernel: the side of its window in pixels, an odd number.
    stride: the distance of two windows in pixels.
    pool: the side of the squares whose maximum is kept; 1 for none.
    depthwise: whether each channel has its own window.
    add: the stream that is added, 0 for the network's input, i for the output of layer i - 1; None for none.
    bits: the bits of an output, whose levels are 0 ... 2^bits - 1.
  """

  width: int
  kernel: int = 3
  stride: int = 1
  pool: int = 1
  depthwise: bool = False
  add: int | None = None
  bits: int = 4


class Plan(NamedTuple):
  """Describes the shape of a network.

  Attributes:
    convs: its layers in order.
    outputs: the number of the head's outputs.
    bits: the bits of an input, whose levels are 0 ... 2^bits - 1.
    by_place: whether the head gives outputs at every place, as a detector's does, or sums over all places.
  """

  convs: tuple[Conv, ...]
  outputs: int
  bits: int = 4
  by_place: bool = False


class Numbers(NamedTuple):
  """Holds the integers of a layer.

  Attributes:
    weights: -1, 0 or 1, (kernel, kernel, inputs, width); with `depthwise` (kernel, kernel, 1, width).
    multiplier: what a sum is multiplied by, from 0 to 255, (width,).
    offset: what is then added, (width,).
    shift: by how many bits the result is then shifted right, (width,).
  """

  weights: Any
  multiplier: Any
  offset: Any
  shift: Any


class Head(NamedTuple):
  """Holds the integers of the head.

  Attributes:
    weights: of at most 8 bits, (inputs, outputs).
    offset: what is added to the sums, (outputs,).
    scale: the logit that a sum of 1 stands for.
  """

  weights: Int8[np.ndarray, 'inputs outputs']
  offset: Int[np.ndarray, ' outputs']
  scale: float


class Network(NamedTuple):
  """Holds a network of integers.

  Attributes:
    plan: its shape.
    shape: (height, width, channels) of its input.
    layers: the integers of its layers.
    head: those of its head.
  """

  plan: Plan
  shape: tuple[int, int, int]
  layers: tuple[Numbers, ...]
  head: Head


def padding(conv: Conv) -> int:
  """Returns how many zeros lie around the image on each side, so that windows are centred on pixels."""
  return conv.kernel // 2


def shapes(plan: Plan, shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
  """Returns the shapes (height, width, channels) of all streams: the input's, and each layer's output's.

  Raises:
    EdgeError: a layer cannot have its shape.
  """
  streams = [shape]
  for i, conv in enumerate(plan.convs):
    height, width, channels = streams[-1]
    if conv.kernel < 1 or conv.kernel % 2 == 0:
      raise EdgeError(f'layer {i}: a kernel of {conv.kernel} has no middle; make it odd')
    if conv.depthwise and conv.width != channels:
      raise EdgeError(f'layer {i}: depthwise, so its width must be that of its input, {channels}, not {conv.width}')
    height, width = (-(-n // conv.stride) for n in (height, width))
    if conv.add is not None:
      added = streams[conv.add] if 0 <= conv.add < len(streams) else None
      if added != (height, width, conv.width):
        there = f'which is {added}' if added else 'which is not before it'
        raise EdgeError(f'layer {i}: adds stream {conv.add}, {there}; it needs {(height, width, conv.width)}')
      earlier = plan.bits if conv.add == 0 else plan.convs[conv.add - 1].bits
      if earlier != conv.bits:
        raise EdgeError(f'layer {i}: adds stream {conv.add} of {earlier} bits to its own {conv.bits}; make them equal')
    if min(height, width) < conv.pool:
      raise EdgeError(f'layer {i}: pools {conv.pool} x {conv.pool} places of {height} x {width}; leave the pooling out')
    streams.append((height // conv.pool, width // conv.pool, conv.width))
  return streams


def bits_of(plan: Plan, stream: int) -> int:
  """Returns the bits of a stream: of the input for 0, of layer i - 1 for i."""
  return plan.bits if stream == 0 else plan.convs[stream - 1].bits


def largest_sums(network: Network) -> list[int]:
  """Returns the largest |acc| that each layer, and at last the head, can reach with any input."""
  places = shapes(network.plan, network.shape)
  bounds = [
    int(np.abs(np.asarray(n.weights, np.int64)).sum((0, 1, 2)).max()) * top(bits_of(network.plan, i))
    for i, n in enumerate(network.layers)
  ]
  height, width, _ = places[-1]
  count = 1 if network.plan.by_place else height * width
  each = np.abs(np.asarray(network.head.weights, np.int64)).sum(0) * top(bits_of(network.plan, len(network.layers)))
  return [*bounds, int((each * count + np.abs(network.head.offset)).max())]


def check(network: Network) -> Network:
  """Returns the network, if its sums fit the integers that compute them.

  Raises:
    EdgeError: a layer's weights are not ternary, or a sum could overflow.
  """
  bounds = largest_sums(network)
  for i, (n, bound) in enumerate(zip(network.layers, bounds, strict=False)):
    if not np.isin(n.weights, (-1, 0, 1)).all():
      raise EdgeError(f'layer {i}: weights other than -1, 0 and 1')
    product = int((np.abs(n.multiplier.astype(np.int64)) * bound + np.abs(n.offset.astype(np.int64))).max())
    if bound >= MOST_EXACT or product > MOST_PRODUCT:
      raise EdgeError(
        f'layer {i}: its sums may reach {bound}, and {product} after the multiplier, more than 24 and 31 bits hold; '
        'make the layer narrower, sparser or of fewer bits'
      )
  if bounds[-1] >= MOST_EXACT:
    raise EdgeError(f'the head: its sums may reach {bounds[-1]}, more than 24 bits hold; pool more before it')
  return network
