"""Convolutions on strips with their halos: strided, dilated, transposed, grouped, in any number of dimensions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ...program import Op, used
from .halo import MICROBATCH, Strip, along, fetch, own, there
from .values import Strips, Value, alike, on_device, refuse
from .windows import Need, Window, need


def convolution(op: Op, inputs: list[Any]) -> list[Value]:
  value, kernel = (on_device(v) for v in inputs)
  p = op.params
  numbers = p['dimension_numbers']
  if not kernel.whole:
    refuse(op, 'its kernel lies in strips')
  space = dict(zip(numbers.lhs_spec[2:], range(len(numbers.lhs_spec) - 2), strict=True))
  x, strips = value.x, [None] * value.x.ndim
  padding, base = list(p['padding']), list(p['lhs_dilation'])
  for dim, strip in value.dims:
    if dim == numbers.lhs_spec[0] and strip.axis == MICROBATCH:
      strips[numbers.out_spec[0]] = strip
      continue
    if dim not in space:
      refuse(op, f'axis {dim}, which is none of space, lies over {strip.axis!r}')
    k = space[dim]
    size = kernel.x.shape[numbers.rhs_spec[2 + k]]
    window = Window(size, p['window_strides'][k], *p['padding'][k], base[k], p['rhs_dilation'][k])
    wanted = need(window, strip)
    if wanted.out.size == 0:
      refuse(op, f'nothing is left of axis {dim}')
    x = fetch(x, dim, strip, wanted.first, wanted.counts)
    x, padding[k], base[k] = _dilated(x, dim, strip, wanted, base[k])
    strips[numbers.out_spec[2 + k]] = wanted.out
  x, weights = alike([marked(x, tuple(strips)), kernel.x])
  y = lax.conv_general_dilated(
    x, weights, p['window_strides'], padding, base, p['rhs_dilation'], numbers, p['feature_group_count'],
    p['batch_group_count'], p['precision'], p['preferred_element_type'],
  )  # fmt: skip
  return [Value(y, tuple(strips))]


def _dilated(x: Array, dim: int, strip: Strip, wanted: Need, base: int) -> tuple[Array, tuple[int, int], int]:
  """Returns the rows, and the padding and dilation that the convolution is to apply to them.

  The convolution dilates the rows itself if all devices begin alike; otherwise they are dilated here.
  """
  if base == 1:
    return x, (0, 0), 1
  length = (x.shape[dim] - 1) * base + 1
  if len(set(wanted.phases)) == 1 and wanted.phases[0] + length <= wanted.span:
    low = wanted.phases[0]
    return x, (low, wanted.span - low - length), base
  config = [(0, 0, 0)] * x.ndim
  config[dim] = (base - 1, wanted.span, base - 1)
  x = lax.pad(x, jnp.zeros((), x.dtype), config)
  start = base - 1 - own(np.asarray(wanted.phases), strip)
  return lax.dynamic_slice_in_dim(x, start, wanted.span, dim), (0, 0), 1


def marked(x: Array, strips: Strips) -> Array:
  """Marks the input of a linear operation so that padding does not count as a use of the kernel.

  `strips` are the strips of the operation's results.
  """
  where = None
  for dim, strip in enumerate(strips):
    if strip is not None and not strip.even:
      rows = along(there(strip), dim, len(strips))
      where = rows if where is None else where & rows
  return x if where is None else used(x, where)


RULES = {'conv_general_dilated': convolution}
