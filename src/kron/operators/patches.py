"""Extracts the patches of a convolution, and computes their Gram matrix without patches if the stride is 1.

The block of two taps i and j is a sum of x[p + i] x[p + j]^T over positions p. Over all positions that touch the image,
the block depends only on the distance j - i. A 3x3 kernel has 13 distances (up to a transpose) for its 81 blocks, and
one convolution of the image with itself computes all of them. It also counts positions outside of the output, which are
then subtracted. Each lies beyond a face of the image, and its patch meets that face with the width of one tap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

Padding = Sequence[tuple[int, int]]


def near(window: Sequence[int], padding: Padding) -> bool:
  """Checks whether the output covers all positions that touch the image, up to one on each side."""
  return all(max(w - 2, 0) <= p <= w - 1 for w, pair in zip(window, padding, strict=True) for p in pair)


def gram_of_patches(
  x: Inexact[Array, 'b *space c'], window: Sequence[int], padding: Padding, dtype: DTypeLike
) -> Float[Array, 'i i']:
  """Sums patch patch^T over all output positions, with the window outermost and the channels innermost.

  Args:
    x: the image.
    window, padding: those of a convolution with stride 1 and no dilation, for which `near` holds.
    dtype: the type of the sums.
  """
  total = _toeplitz(_correlations(x, window, dtype), window)
  for axis in range(len(window)):
    for high, pad in enumerate(padding[axis]):
      if pad < window[axis] - 1:
        total = _without(total, axis, high, window, _beyond(x, axis, high, window, padding, dtype))
  return total


def _correlations(x: Inexact[Array, 'b *space c'], window: Sequence[int], dtype: DTypeLike) -> Float[Array, 'c c *d']:
  """Sums x[q]_k x[q + d]_l over q, as (l, k, *d), with d from 0 along the first axis and from 1 - w along the others.

  This is a convolution that takes the channels as its batch and the batch as its channels, as a kernel's gradient does.
  """
  k = len(window)
  space = ''.join(chr(ord('a') + axis) for axis in range(k))
  reach = [(0, window[0] - 1), *((w - 1, w - 1) for w in window[1:])]
  names = (f'C{space}N', f'I{space}O', f'NC{space}')
  return lax.conv_general_dilated(x, x, (1,) * k, reach, dimension_numbers=names, preferred_element_type=dtype)


def _toeplitz(correlations: Float[Array, 'c c *d'], window: Sequence[int]) -> Float[Array, 'i i']:
  """Lays out the blocks of all pairs of taps from the blocks of their distances."""
  c, taps = correlations.shape[0], list(itertools.product(*map(range, window)))
  flat = correlations.reshape(c, c, -1)  # l, k, d: x[q]_k x[q + d]_l
  lengths = [window[0], *(2 * w - 1 for w in window[1:])]
  index = np.zeros((len(taps),) * 2, int)
  for (m, i), (n, j) in itertools.product(enumerate(taps), repeat=2):
    d = np.subtract(j, i)
    backward = d[0] < 0
    d = -d if backward else d
    place = np.ravel_multi_index([d[0], *(d[1:] + np.array(window[1:], int) - 1)], lengths)
    index[m, n] = place + backward * math.prod(lengths)
  both = jnp.concatenate([flat.transpose(2, 1, 0), flat.transpose(2, 0, 1)])
  return jnp.take(both, index, 0).transpose(0, 2, 1, 3).reshape(len(taps) * c, -1)


def _beyond(
  x: Inexact[Array, 'b *space c'], axis: int, high: int, window: Sequence[int], padding: Padding, dtype: DTypeLike
) -> Float[Array, 'j j']:
  """Sums the products of the taps that meet the image, over the positions just beyond one side of the output.

  Along earlier axes, these positions are those of the output; along later axes, they are all that touch the image. Thus
  no corner counts twice.
  """
  c, size = x.shape[-1], x.shape[1 + axis]
  others = [a for a in range(len(window)) if a != axis]
  edge = lax.index_in_dim(x, size - 1 if high else 0, 1 + axis, keepdims=False)
  reach = [padding[a] if a < axis else (window[a] - 1,) * 2 for a in others]
  edge = jnp.pad(edge, [(0, 0), *reach, (0, 0)])
  narrow = [window[a] for a in others]
  rows = patches(edge, narrow, *((1,) * len(others),) * 2).reshape(-1, math.prod(narrow) * c)
  return lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def _without(
  total: Float[Array, 'i i'], axis: int, high: int, window: Sequence[int], block: Float[Array, 'j j']
) -> Float[Array, 'i i']:
  """Subtracts the patches beyond one face, which meet it with their last tap (low side) or their first (high side)."""
  shape = (*window, total.shape[0] // math.prod(window))
  tap = 0 if high else window[axis] - 1
  start = [tap if a == axis else 0 for a in range(len(shape))] * 2
  size = [1 if a == axis else n for a, n in enumerate(shape)] * 2
  grid = total.reshape(shape * 2)
  part = lax.dynamic_slice(grid, start, size) - block.reshape(size)
  return lax.dynamic_update_slice(grid, part, start).reshape(total.shape)


def patches(
  x: Inexact[Array, 'b *space c'], window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Inexact[Array, 'b *places *window c']:
  """Returns the patch under the kernel at each place, extracted along one spatial axis after another."""
  k = len(window)
  for axis in reversed(range(k)):
    x = _windows(x, axis + 1, window[axis], strides[axis], dilation[axis])
  return x.transpose(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2), 2 * k + 1)


def _windows(x: Inexact[Array, '...'], axis: int, size: int, stride: int, dilation: int) -> Inexact[Array, '...']:
  """Splits an axis into (places, size), with one window at each place.

  Constant indices pick the windows: as fast on CPU as shifted slices put side by side, and much faster to compile.
  """
  places = np.arange(0, x.shape[axis] - (size - 1) * dilation, stride)
  if size == 1:
    return jnp.expand_dims(lax.slice_in_dim(x, 0, None, stride, axis), axis + 1)
  return jnp.take(x, places[:, None] + dilation * np.arange(size), axis, mode='clip')
