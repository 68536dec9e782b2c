"""A rule for pooling: the largest, smallest or summed entries under a window."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ...program import Op
from .halo import along, fetch, own
from .reductions import neutral
from .values import Value, on_device, refuse
from .windows import Window, need

_JOIN = {'reduce_window_sum': lax.add, 'reduce_window_max': lax.max, 'reduce_window_min': lax.min}


def pool(op: Op, inputs: list[Any]) -> list[Value]:
  value, p = on_device(inputs[0]), op.params
  x, strips, padding = value.x, list(value.strips), list(p['padding'])
  nothing = neutral(op.name.replace('reduce_window', 'reduce'), x.dtype)
  for dim, strip in value.dims:
    if p['base_dilation'][dim] != 1:
      refuse(op, f'its input is dilated along axis {dim}, which lies over {strip.axis!r}')
    window = Window(p['window_dimensions'][dim], p['window_strides'][dim], *padding[dim], 1, p['window_dilation'][dim])
    wanted = need(window, strip)
    x = fetch(x, dim, strip, wanted.first, wanted.counts)
    if nothing:
      rows = own(np.asarray(wanted.first), strip) + jnp.arange(x.shape[dim])
      x = jnp.where(along((rows >= 0) & (rows < strip.size), dim, x.ndim), x, jnp.asarray(nothing, x.dtype))
    strips[dim], padding[dim] = wanted.out, (0, 0)
  y = lax.reduce_window(
    x, np.asarray(nothing, x.dtype), _JOIN[op.name], p['window_dimensions'], p['window_strides'], padding,
    p['base_dilation'], p['window_dilation'],
  )  # fmt: skip
  return [Value(y, tuple(strips))]


RULES = dict.fromkeys(_JOIN, pool)
