"""Convolutions in any number of dimensions, with stride, padding, dilation of the kernel or of the input, and groups.

The rows of a convolution are its patches (KFC, Grosse and Martens 2016, eq. 12), extracted along one spatial axis after
another; a convolution with one-hot kernels would take several times as long. Groups are slots, with one pair of factors
each; a depthwise convolution has one slot for each channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from ...program import Op
from ..errors import CurvatureError
from .dense import kernel_matrix
from .factor import accurate
from .masks import fits
from .patches import gram_of_patches, near, patches
from .weights import Weight


class Conv(NamedTuple):
  """A `conv_general_dilated`; the kernel is its second operand, its output channels split into (groups, n_out)."""

  kernel_shape: tuple[int, ...]
  kernel_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
  slots: int
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

  name = 'conv'
  one_hot = False

  @classmethod
  def recognise(cls, op: Op, position: int, weight: Weight) -> Conv | None:
    """Returns the operator if `op` convolves data with the kernel in operand `position`, else None."""
    if op.name != 'conv_general_dilated' or position != 1 or not weight.covers(op.inputs[1].shape):
      return None
    p = op.params
    if p['batch_group_count'] != 1:
      return None
    groups, shape, numbers = p['feature_group_count'], op.inputs[1].shape, p['dimension_numbers']
    out, channels, *space = numbers.rhs_spec
    split = (*shape[:out], groups, shape[out] // groups, *shape[out + 1 :])
    channels, space = channels + (channels > out), [a + (a > out) for a in space]
    return cls(
      kernel_shape=split,
      kernel_axes=((out,), (*space, channels), (out + 1,)),
      slots=groups,
      n_in=math.prod(shape) // shape[out],
      n_out=shape[out] // groups,
      features=(numbers.out_spec[1],),
      window=tuple(split[a] for a in space),
      strides=tuple(p['window_strides']),
      padding=tuple(p['padding']),
      input_dilation=tuple(p['lhs_dilation']),
      kernel_dilation=tuple(p['rhs_dilation']),
      input_spec=tuple(numbers.lhs_spec),
      output_spec=tuple(numbers.out_spec),
    )

  def matrix(self, kernel: Array) -> Float[Array, 's i o']:
    return kernel_matrix(self, kernel)

  @property
  def examples(self) -> tuple[int, int]:
    return self.input_spec[0], self.output_spec[0]

  @property
  def row_axes(self) -> tuple[int, ...]:
    return tuple(a - (a > self.kernel_axes[0][0]) for a in self.kernel_axes[1])

  @property
  def column_axes(self) -> tuple[int, ...]:
    return self.kernel_axes[0]

  def input_rows(self, x: Inexact[Array, '...']) -> Inexact[Array, 's b r i']:
    """Returns one row for each output position: the patch under the kernel, window outermost, channels innermost."""
    batch, channels, *space = self.input_spec
    x = x.transpose((batch, *space, channels))
    dilated = zip(self.padding, self.input_dilation, strict=True)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((lo, hi, d - 1) for (lo, hi), d in dilated), (0, 0, 0)])
    n, c = x.shape[0], x.shape[-1]
    x = patches(x, self.window, self.strides, self.kernel_dilation)
    if self.slots == 1:
      return x.reshape(1, n, -1, self.n_in)
    x = x.reshape(n, -1, math.prod(self.window), self.slots, c // self.slots)
    return x.transpose(3, 0, 1, 2, 4).reshape(self.slots, n, -1, self.n_in)

  def by_distance(self, x: Inexact[Array, '...']) -> bool:
    """Checks whether `input_gram` applies: one group, stride 1, no dilation, output about as large as the input.

    Inputs with few channels use rows instead, because the product for one distance would be too small. So do outputs
    with few places, where writing the factor takes longer than its products.
    """
    plain = self.slots == 1 and {*self.strides, *self.input_dilation, *self.kernel_dilation} == {1}
    wide = math.prod(self.window) > 1 and x.shape[self.input_spec[1]] >= 8
    if not (plain and wide and near(self.window, self.padding)) or jnp.iscomplexobj(x):
      return False
    return self.places(x) >= 1024

  def input_gram(self, x: Inexact[Array, '...']) -> Float[Array, 'i i']:
    """Returns the sum of a aT over the rows a of `input_rows`."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    batch, channels, *space = self.input_spec
    return gram_of_patches(x.transpose(batch, *space, channels), self.window, self.padding, dtype)

  def input_sum(self, x: Inexact[Array, '...']) -> Float[Array, ' i']:
    """Returns the sum of the rows of `input_rows`."""
    return self.input_rows(accurate(x).sum(self.input_spec[0], keepdims=True))[0, 0].sum(0)

  def places(self, x: Inexact[Array, '...']) -> int:
    """Returns the number of rows in `input_rows` for a convolution that is `by_distance`."""
    batch, _, *space = (x.shape[a] for a in self.input_spec)
    sizes = (n + sum(p) - w + 1 for n, p, w in zip(space, self.padding, self.window, strict=True))
    return batch * math.prod(sizes)

  def mask(
    self, where: Float[Array, '...'], x: Inexact[Array, '...'], dy: Inexact[Array, '...']
  ) -> Float[Array, '...']:
    """Returns a mask of uses (see `kron.used`) with the axes of the input and the spatial size of the result."""
    batch, channels, *space = self.input_spec
    shape = [1] * x.ndim
    for a, b in zip((batch, *space), (self.output_spec[0], *self.output_spec[2:]), strict=True):
      shape[a] = dy.shape[b]
    full = where.min(channels, keepdims=True)
    if not fits(full.shape, tuple(shape)):
      raise CurvatureError(
        f'kron.used: where has shape {where.shape}, but the convolution that reads it has {tuple(shape)} results'
      )
    return jnp.broadcast_to(full, shape)

  def mask_rows(self, where: Float[Array, '...'], dy: Inexact[Array, '...']) -> Float[Array, 's b r 1']:
    """Returns one number for each row, the mask at its output position."""
    del dy
    batch, channels, *space = self.input_spec
    rows = where.transpose((batch, *space, channels)).reshape(1, where.shape[batch], -1, 1)
    return jnp.broadcast_to(rows, (self.slots, *rows.shape[1:]))

  def output_rows(self, dy: Inexact[Array, '...']) -> Inexact[Array, 's b r o']:
    batch, channels, *space = self.output_spec
    dy = dy.transpose((batch, *space, channels))
    if self.slots == 1:
      return dy.reshape(1, dy.shape[0], -1, self.n_out)
    return dy.reshape(dy.shape[0], -1, self.slots, self.n_out).transpose(2, 0, 1, 3)
