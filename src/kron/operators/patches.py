"""The Gram matrix of a convolution's patches without the patches, where the stride is 1.

The block of two taps i and j is a sum of x[p + i] x[p + j]^T over positions p. Over all positions that touch the image it
depends on their distance j - i alone: a 3x3 kernel has 13 distances (up to a transpose) for its 81 blocks, and all of
them are one convolution of the image with itself. Positions outside of the output, which this counts too, are taken off:
each is beyond a face of the image, where its patch meets that face with one tap's width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Padding = Sequence[tuple[int, int]]


def near(window: Sequence[int], padding: Padding) -> bool:
  """Whether the output reaches to within one position of all that touch the image."""
  return all(w - 2 <= p <= w - 1 for w, pair in zip(window, padding, strict=True) for p in pair)


def gram_of_patches(
  x: Float[Array, 'b *space c'], window: Sequence[int], padding: Padding, dtype: jnp.dtype
) -> Float[Array, 'i i']:
  """The sum over all output positions of patch patch^T, the window outermost and channels innermost.

  Args:
    x: the image.
    window, padding: of a convolution with stride 1 and no dilation that is `near`.
    dtype: of the sums.
  """
  total = _toeplitz(_correlations(x, window, dtype), window)
  for axis in range(len(window)):
    for k, missing in enumerate(w - 1 - p for w, p in zip((window[axis],) * 2, padding[axis], strict=True)):
      if missing:
        total = total - _beyond(x, axis, k, window, padding, dtype)
  return total


def _correlations(x: Float[Array, 'b *space c'], window: Sequence[int], dtype: jnp.dtype) -> Float[Array, 'c c *d']:
  """Sums of x[q]_k x[q + d]_l over q, (l, k, *d); d from 0 along the first axis, from 1 - w along the others.

  A convolution whose batch axis is the channels and whose channels are the batch, as in a kernel's gradient.
  """
  k = len(window)
  space = ''.join('DHW'[3 - k :][a] for a in range(k)) if k <= 3 else ''.join(chr(97 + a) for a in range(k))
  reach = [(0, window[0] - 1), *((w - 1, w - 1) for w in window[1:])]
  names = (f'C{space}N', f'I{space}O', f'NC{space}')
  return lax.conv_general_dilated(x, x, (1,) * k, reach, dimension_numbers=names, preferred_element_type=dtype)


def _toeplitz(found: Float[Array, 'c c *d'], window: Sequence[int]) -> Float[Array, 'i i']:
  """The blocks of all pairs of taps from those of their distances."""
  c, taps = found.shape[0], list(itertools.product(*map(range, window)))
  flat = found.reshape(c, c, -1)  # l, k, d: x[q]_k x[q + d]_l
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
  x: Float[Array, 'b *space c'], axis: int, high: int, window: Sequence[int], padding: Padding, dtype: jnp.dtype
) -> Float[Array, 'i i']:
  """The sum of patch patch^T over the positions just outside of the output on one side of an axis.

  Along earlier axes they are those of the output, along later ones all that touch the image: so no corner counts twice.
  """
  c, size = x.shape[-1], x.shape[1 + axis]
  others = [a for a in range(len(window)) if a != axis]
  edge = lax.index_in_dim(x, size - 1 if high else 0, 1 + axis, keepdims=False)
  reach = [padding[a] if a < axis else (window[a] - 1,) * 2 for a in others]
  edge = jnp.pad(edge, [(0, 0), *reach, (0, 0)])
  for n, a in reversed(list(enumerate(others))):
    places = np.arange(edge.shape[1 + n] - window[a] + 1)[:, None] + np.arange(window[a])
    edge = jnp.take(edge, places, 1 + n)
  k = len(others)
  rows = edge.transpose(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2), 2 * k + 1)
  rows = rows.reshape(-1, math.prod(window[a] for a in others) * c)
  block = lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
  # The face meets the last tap of patches below it, and the first of those above.
  taps = np.arange(math.prod(window)).reshape(window).take(0 if high else -1, axis).reshape(-1)
  where = (taps[:, None] * c + np.arange(c)).reshape(-1)
  return jnp.zeros((math.prod(window) * c,) * 2, block.dtype).at[where[:, None], where].set(block)
