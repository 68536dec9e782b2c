"""Convolutions in any number of dimensions, with stride, padding and dilation of the kernel or of the input.

The rows of a convolution are its patches, taken as shifted slices rather than by a convolution with one-hot kernels
(KFC, Grosse and Martens 2016, eq. 12; design.md has the times of both).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..program import Op
from ..weights import Move, Weight


class Conv(NamedTuple):
  """`conv_general_dilated` with one group; the kernel is its second operand."""

  kernel_moves: tuple[Move, ...]  # kernel -> (window * channels in, channels out)
  n_in: int
  n_out: int
  features: tuple[int, ...]
  window: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  input_dilation: tuple[int, ...]
  kernel_dilation: tuple[int, ...]
  input_spec: tuple[int, ...]  # the axes of batch, channels, space...
  output_spec: tuple[int, ...]
  scale: float

  name = 'conv'

  @classmethod
  def recognise(cls, op: Op, position: int, weight: Weight) -> Conv | None:
    """The operator, if `op` convolves data with the kernel in operand `position`."""
    if op.name != 'conv_general_dilated' or position != 1 or not weight.covers(op.inputs[1].shape):
      return None
    p = op.params
    if p['feature_group_count'] != 1 or p['batch_group_count'] != 1:
      return None
    shape, numbers = op.inputs[1].shape, p['dimension_numbers']
    out, channels, *space = numbers.rhs_spec
    return cls(
      kernel_moves=weight.matrix_moves((*space, channels), (out,)),
      n_in=math.prod(shape) // shape[out],
      n_out=shape[out],
      features=(numbers.out_spec[1],),
      window=tuple(shape[a] for a in space),
      strides=tuple(p['window_strides']),
      padding=tuple(p['padding']),
      input_dilation=tuple(p['lhs_dilation']),
      kernel_dilation=tuple(p['rhs_dilation']),
      input_spec=tuple(numbers.lhs_spec),
      output_spec=tuple(numbers.out_spec),
      scale=weight.scale,
    )

  def input_rows(self, x: Float[Array, '...']) -> Float[Array, 'rows n_in']:
    """One row for each output position: the patch under the kernel, window outermost, channels innermost."""
    batch, channels, *space = self.input_spec
    x = x.transpose((batch, *space, channels))
    dilated = zip(self.padding, self.input_dilation, strict=True)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((lo, hi, d - 1) for (lo, hi), d in dilated), (0, 0, 0)])
    reach = [(k - 1) * d for k, d in zip(self.window, self.kernel_dilation, strict=True)]
    n, *size, c = x.shape
    slices = []
    for offset in itertools.product(*(range(k) for k in self.window)):
      start = [o * d for o, d in zip(offset, self.kernel_dilation, strict=True)]
      limit = [s + length - r for s, length, r in zip(start, size, reach, strict=True)]
      slices.append(lax.slice(x, (0, *start, 0), (n, *limit, c), (1, *self.strides, 1)))
    return jnp.concatenate(slices, axis=-1).reshape(-1, self.n_in)

  def output_rows(self, dy: Float[Array, '...']) -> Float[Array, 'rows n_out']:
    batch, channels, *space = self.output_spec
    return dy.transpose((batch, *space, channels)).reshape(-1, self.n_out)
