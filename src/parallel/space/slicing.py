"""Runs operations that pick, repeat, pad and join rows at places that the program knows, by exchanges of rows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ...program import Op
from .halo import Strip, along, fetch, own, own_part
from .values import Value, common, laid, number, on_device, refuse


def picked(op: Op, x: Array, dim: int, strip: Strip, rows: Int[np.ndarray, ' k']) -> tuple[Array, Strip]:
  """Picks rows by number from an axis in strips; a number outside of the axis gives a row of zeros."""
  out = strip.of(len(rows))
  rows = np.where((rows >= 0) & (rows < strip.size), rows, -1)
  table = np.where(out.places >= 0, rows[out.places], -1).reshape(out.shards, out.rows)
  there = table >= 0
  first = np.where(there, table, strip.size).min(1, initial=strip.size)
  last = np.where(there, table, -1).max(1, initial=-1)
  counts = np.maximum(last - first + 1, 0)
  first = np.where(counts, first, 0)
  needed = max(len(set(row[row >= 0])) for row in table)
  if counts.max() > 2 * needed + 2:
    refuse(op, f'each device needs rows of axis {dim} that lie far apart over {strip.axis!r}')
  x = fetch(x, dim, strip, first, counts)
  local = np.where(there, table - first[:, None], -1)
  if (local == np.arange(out.rows)).all() and x.shape[dim] == out.rows:
    return x, out
  places = own(local, strip)
  x = jnp.take(x, jnp.maximum(places, 0), axis=dim)
  if not there.all():
    x = jnp.where(along(places >= 0, dim, x.ndim), x, jnp.zeros((), x.dtype))
  return x, out


def slices(op: Op, inputs: list[Any]) -> list[Value]:
  value, p = on_device(inputs[0]), op.params
  x, strips = value.x, list(value.strips)
  starts, limits = list(p['start_indices']), list(p['limit_indices'])
  steps = list(p['strides'] or (1,) * x.ndim)
  for dim, strip in value.dims:
    if (starts[dim], limits[dim], steps[dim]) != (0, strip.size, 1):
      x, strips[dim] = picked(op, x, dim, strip, np.arange(starts[dim], limits[dim], steps[dim]))
    starts[dim], limits[dim], steps[dim] = 0, x.shape[dim], 1
  return [Value(lax.slice(x, starts, limits, steps), tuple(strips))]


def dynamic_slice(op: Op, inputs: list[Any]) -> list[Value]:
  value, sizes = on_device(inputs[0]), list(op.params['slice_sizes'])
  x, strips, places = value.x, list(value.strips), [on_device(v).x for v in inputs[1:]]
  for dim, strip in value.dims:
    if sizes[dim] != strip.size:
      start = number(inputs[1 + dim])
      if start is None:
        refuse(op, f'where it begins along axis {dim}, which lies over {strip.axis!r}, depends on data')
      start = int(np.clip(start, 0, strip.size - sizes[dim]))
      x, strips[dim] = picked(op, x, dim, strip, np.arange(start, start + sizes[dim]))
    sizes[dim], places[dim] = x.shape[dim], 0
  return [Value(lax.dynamic_slice(x, places, sizes), tuple(strips))]


def rev(op: Op, inputs: list[Any]) -> list[Value]:
  value = on_device(inputs[0])
  x, strips = value.x, list(value.strips)
  others = [dim for dim in op.params['dimensions'] if strips[dim] is None]
  for dim, strip in value.dims:
    if dim in op.params['dimensions']:
      x, strips[dim] = picked(op, x, dim, strip, np.arange(strip.size)[::-1])
  return [Value(lax.rev(x, others), tuple(strips))]


def pad(op: Op, inputs: list[Any]) -> list[Value]:
  value, filling = (on_device(v) for v in inputs)
  x, strips, config = value.x, list(value.strips), list(op.params['padding_config'])
  for dim, strip in value.dims:
    low, high, interior = config[dim]
    if interior:
      refuse(op, f'it dilates axis {dim}, which lies over {strip.axis!r}')
    rows = np.arange(-low, strip.size + high)
    x, out = (x, strip) if not (low or high) else picked(op, x, dim, strip, rows)
    if low or high:
      place = own(out.firsts, out) + jnp.arange(out.rows)
      x = jnp.where(along((place >= low) & (place < low + strip.size), dim, x.ndim), x, filling.x)
    strips[dim], config[dim] = out, (0, 0, 0)
  return [Value(lax.pad(x, filling.x, config), tuple(strips))]


def concatenate(op: Op, inputs: list[Any]) -> list[Value]:
  values, dim = [on_device(v) for v in inputs], op.params['dimension']
  joined = next((v.strips[dim] for v in values if v.strips[dim] is not None), None)
  others = common(
    [v._replace(strips=tuple(None if a == dim else s for a, s in enumerate(v.strips))) for v in values], op
  )
  if joined is None:
    return [Value(lax.concatenate([laid(v, others) for v in values], dim), others)]
  out = joined.of(sum(v.shape[dim] for v in values))
  parts, offset = [], 0
  for v in values:
    strip = v.strips[dim]
    x = laid(v._replace(strips=tuple(None if a == dim else s for a, s in enumerate(v.strips))), others)
    if strip is None:
      room = [(offset, out.size - offset - v.shape[dim]) if a == dim else (0, 0) for a in range(x.ndim)]
      parts.append(own_part(jnp.pad(x, room), dim, out))
    else:
      parts.append(fetch(x, dim, strip, out.firsts - offset, out.counts))
    offset += v.shape[dim]
  total = parts[0]
  for part in parts[1:]:
    total = total | part if total.dtype == jnp.bool_ else total + part
  strips = tuple(out if a == dim else s for a, s in enumerate(others))
  return [Value(total, strips)]


def gather(op: Op, inputs: list[Any]) -> list[Value]:
  """Gathers rows at known places along an axis in strips, or runs any gather that takes all of such an axis."""
  value, p = on_device(inputs[0]), op.params
  places = inputs[1]
  if isinstance(places, Value) and not places.whole:
    refuse(op, 'the places that it reads lie in strips')
  d, sizes = p['dimension_numbers'], list(p['slice_sizes'])
  x = value.x
  gone = {*d.collapsed_slice_dims, *getattr(d, 'operand_batching_dims', ())}
  offsets = dict(zip([a for a in range(x.ndim) if a not in gone], d.offset_dims, strict=True))
  strips = [None] * len(op.outputs[0].shape)
  for dim, strip in value.dims:
    if dim in offsets and sizes[dim] == strip.size:
      sizes[dim], strips[offsets[dim]] = x.shape[dim], strip
      continue
    rows = number(places)
    alone = tuple(d.start_index_map) == (dim,) and d.collapsed_slice_dims == (dim,) and len(value.dims) == 1
    if rows is None or not alone or rows.ndim != 2:
      refuse(op, f'it reads rows of axis {dim}, which lies over {strip.axis!r}, at places that are not known before')
    rows = rows[:, 0].astype(np.int64)
    if 'CLIP' in str(p['mode']).upper():
      rows = np.clip(rows, 0, strip.size - 1)
    batch = next(a for a in range(len(strips)) if a not in d.offset_dims)
    x, out = picked(op, x, dim, strip, rows)
    strips[batch] = out
    return [Value(jnp.moveaxis(x, dim, batch), tuple(strips))]
  (y,) = _with_sizes(op, x, on_device(places).x, sizes)
  return [Value(y, tuple(strips))]


def _with_sizes(op: Op, x: Array, places: Array, sizes: list[int]) -> list[Array]:
  p = op.params
  return [
    lax.gather(
      x, places, p['dimension_numbers'], tuple(sizes), unique_indices=p['unique_indices'],
      indices_are_sorted=p['indices_are_sorted'], mode=p['mode'], fill_value=p['fill_value'],
    )
  ]  # fmt: skip


RULES = {
  'slice': slices,
  'dynamic_slice': dynamic_slice,
  'rev': rev,
  'pad': pad,
  'concatenate': concatenate,
  'gather': gather,
}
