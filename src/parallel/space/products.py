"""Matrix products over whole axes and over axes in strips.

A product along whole axes runs as it is. Over an axis in strips it is summed over the devices; or it runs on a halo, if
the other matrix is known and each row of the result reads few rows (as in resizing).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from ...program import Op
from .convolutions import marked
from .halo import MICROBATCH, Strip, cleared, fetch, own
from .values import Value, alike, laid, number, on_device, refuse, summed


def dot_general(op: Op, inputs: list[Any]) -> list[Value]:
  p = op.params
  values = [on_device(v) for v in inputs]
  (contracted, batched) = p['dimension_numbers']
  for k, other in ((0, 1), (1, 0)):  # the other matrix may be known, with few entries in each column
    matrix = number(inputs[other]) if len(contracted[k]) == 1 else None
    strip = values[k].strips[contracted[k][0]] if matrix is not None else None
    if strip is not None and matrix.ndim == 2:
      banded = _banded(op, values[k], k, strip, matrix)
      if banded is not None:
        return [banded]
  xs = [v.x for v in values]
  names: list[str] = []
  for dims in zip(*contracted, strict=True):
    axis_strips = [v.strips[d] for v, d in zip(values, dims, strict=True)]
    strip = axis_strips[0] or axis_strips[1]
    if strip is None:
      continue
    if strip.axis == MICROBATCH:
      refuse(op, 'it puts examples together, and a pipeline has some of them at a time')
    names.append(strip.axis)
    xs = [_as(v, x, d, strip) for v, x, d in zip(values, xs, dims, strict=True)]
    xs[0] = cleared(xs[0], dims[0], strip)
    xs[1] = cleared(xs[1], dims[1], strip)
  strips: list[Strip | None] = []
  for dims in zip(*batched, strict=True):
    axis_strips = [v.strips[d] for v, d in zip(values, dims, strict=True)]
    strip = axis_strips[0] or axis_strips[1]
    if strip is not None:
      xs = [_as(v, x, d, strip) for v, x, d in zip(values, xs, dims, strict=True)]
    strips.append(strip)
  for k in range(2):
    strips += [s for d, s in enumerate(values[k].strips) if d not in (*contracted[k], *batched[k])]
  axes = [s.axis for s in strips if s is not None]
  if len(set(axes)) < len(axes) or set(axes) & set(names):
    twice = max({*axes, *names}, key=(axes + names).count)
    refuse(
      op, f'both of its operands lie over {twice!r}, each along an axis of its own, so that each device needs all rows'
    )
  if not names:
    k = int(values[0].whole)
    if values[1 - k].whole:
      xs[k] = marked(xs[k], tuple(strips))
  left, right = alike(xs)
  types = {'precision': p['precision'], 'preferred_element_type': p['preferred_element_type']}
  y = lax.dot_general(left, right, p['dimension_numbers'], **types)
  return [Value(summed(y, tuple(names)) if names else y, tuple(strips))]


def _as(value: Value, x: Any, dim: int, strip: Strip) -> Any:
  one = tuple(strip if d == dim else None for d in range(x.ndim))
  return laid(Value(x, tuple(value.strips[d] if d == dim else None for d in range(x.ndim))), one)


def _banded(op: Op, value: Value, k: int, strip: Strip, matrix: Float[np.ndarray, 'a b']) -> Value | None:
  """Multiplies by a known matrix if each device's rows of the result read nearby rows; otherwise returns None."""
  (contracted, _) = op.params['dimension_numbers']
  dim, side = contracted[k][0], contracted[1 - k][0]
  weights = np.moveaxis(matrix, side, 0)  # rows, rows of the result
  out = strip.of(weights.shape[1])
  by_device = np.where(out.places >= 0, weights[:, out.places], 0).reshape(strip.size, out.shards, out.rows)
  reads = np.abs(by_device).sum(2) > 0
  first = np.where(reads.any(0), reads.argmax(0), 0)
  last = np.where(reads.any(0), strip.size - 1 - reads[::-1].argmax(0), 0)
  counts = np.where(reads.any(0), last - first + 1, 0)
  count = max(counts.max(), 1)
  if count > 2 * strip.rows and strip.shards > 2:
    return None
  table = np.zeros((strip.shards, count, out.rows), matrix.dtype)
  for i in range(strip.shards):
    here = by_device[first[i] : first[i] + count, i]
    table[i, : len(here)] = here
  x = fetch(value.x, dim, strip, first, counts)
  # The result has the remaining axes of x and then the matrix's axis, or the other way round.
  p = op.params
  y = lax.dot_general(
    x,
    own(table, strip),
    (((dim,), (0,)), ((), ())),
    precision=p['precision'],
    preferred_element_type=p['preferred_element_type'],
  )
  strips = [s for d, s in enumerate(value.strips) if d != dim]
  if k == 0:
    return Value(y, (*strips, out))
  return Value(jnp.moveaxis(y, -1, 0), (out, *strips))


RULES = {'dot_general': dot_general}
