"""Thresholds of sums: the least sum that reaches each level, which is all that a layer's multiplier and offset say.

A layer's logic adds up ~x = 2^bits - 1 - x in place of -x, so that no sum is negative. That adds a constant for each
negative weight, which goes into the thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ..activations import top
from ..layers import Conv, Numbers


class Channel(NamedTuple):
  """The sums of one channel, and their thresholds.

  most: the largest sum. width: the bits of a sum. thresholds: (2^bits - 1,), the least sums that reach levels 1, 2, ...;
  a level that no sum reaches has most + 1.
  """

  most: int
  width: int
  thresholds: Int[np.ndarray, ' levels']


def level_bits(conv: Conv) -> int:
  """Returns the bits of a level that is searched: a layer that adds has twice the levels, the lower half negative."""
  return conv.bits + (conv.add is not None)


def channels(conv: Conv, numbers: Numbers, bits_in: int) -> list[Channel]:
  """Returns the sums and thresholds of a layer's channels."""
  unit = top(bits_in)
  lowest = 0 if conv.add is None else -(2**conv.bits)
  levels = np.arange(1, 2 ** level_bits(conv)) + lowest
  found = []
  for o in range(conv.width):
    weights = np.asarray(numbers.weights[..., o], int)
    most, negative = int(np.abs(weights).sum()) * unit, int((weights < 0).sum()) * unit
    multiplier, offset, shift = (int(n[o]) for n in numbers[1:])
    if multiplier > 0:
      # (multiplier acc + offset) >> shift >= level, where acc is the sum less `negative`
      least = -((offset - (levels << shift)) // multiplier) + negative
    else:
      least = np.where(levels <= offset >> shift, 0, most + 1)
    least = np.clip(least, 0, most + 1)
    largest = int(least.max())
    found.append(Channel(most, max(most, largest).bit_length() or 1, least))
  return found


def as_tree(thresholds: Int[np.ndarray, ' levels']) -> list[int]:
  """Orders thresholds as `search.v` reads them: node 1 is the middle, nodes 2n and 2n + 1 the middles beside node n."""
  count = len(thresholds) + 1
  tree = [0]
  for node in range(1, count):
    depth = node.bit_length() - 1
    step = count >> (depth + 1)
    tree.append(int(thresholds[(2 * (node - (1 << depth)) + 1) * step - 1]))
  return tree


def columns(tree: list[int], width: int) -> str:
  """Returns a constant with the lowest bits of a tree's thresholds, node 0 lowest, then the next bits, and so on."""
  bits = [sum((value >> b & 1) << node for node, value in enumerate(tree)) for b in range(width)]
  return constant(bits, len(tree))


def constant(values: list[int], width: int) -> str:
  """Returns a Verilog constant that holds these values, the first one lowest, of `width` bits each."""
  digits = -(-width // 4)
  return '{' + ', '.join(f"{width}'h{v:0{digits}x}" for v in reversed(values)) + '}'
