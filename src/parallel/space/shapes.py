"""Rules for operations that rearrange axes: transpositions, repetitions, reshapes."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from ...program import Op
from .halo import Strip, moved
from .values import Value, alike, common, laid, on_device, refuse


def transpose(op: Op, inputs: list[Any]) -> list[Value]:
  value, order = on_device(inputs[0]), op.params['permutation']
  return [Value(value.x.transpose(order), tuple(value.strips[a] for a in order))]


def broadcast_in_dim(op: Op, inputs: list[Any]) -> list[Value]:
  value, dims = on_device(inputs[0]), op.params['broadcast_dimensions']
  shape, strips = list(op.params['shape']), [None] * len(op.params['shape'])
  for dim, strip in value.dims:
    if shape[dims[dim]] != strip.size:  # an axis of length 1, repeated
      refuse(op, f'axis {dim} of length {strip.size} lies over {strip.axis!r} and is repeated')
    shape[dims[dim]], strips[dims[dim]] = value.x.shape[dim], strip
  return [Value(lax.broadcast_in_dim(value.x, tuple(shape), dims), tuple(strips))]


def squeeze(op: Op, inputs: list[Any]) -> list[Value]:
  value, gone = on_device(inputs[0]), op.params['dimensions']
  for dim, strip in value.dims:
    if dim in gone:
      refuse(op, f'axis {dim} of length 1 lies over {strip.axis!r}')
  kept = [a for a in range(len(value.strips)) if a not in gone]
  return [Value(lax.squeeze(value.x, gone), tuple(value.strips[a] for a in kept))]


def expand_dims(op: Op, inputs: list[Any]) -> list[Value]:
  value, new = on_device(inputs[0]), op.params['dimensions']
  strips = list(value.strips)
  for a in sorted(new):
    strips.insert(a, None)
  return [Value(lax.expand_dims(value.x, new), tuple(strips))]


def reshape(op: Op, inputs: list[Any]) -> list[Value]:
  """Reshapes a value by joining and splitting groups of axes.

  Only the first axis of a group may be in strips. The first axis of the group's result is then in strips too. If an
  axis in strips is split, as in space-to-depth, it first gets strips that can each be split.
  """
  value, old, new = on_device(inputs[0]), None, tuple(op.params['new_sizes'])
  if op.params.get('dimensions') is not None:
    refuse(op, 'it transposes on the way')
  old = value.shape
  x, strips, local = value.x, [None] * len(new), list(new)
  for olds, news in groups(old, new):
    lying = [(a, value.strips[a]) for a in olds if value.strips[a] is not None]
    if not lying:
      continue
    (a, strip), *more = lying
    long = [b for b in olds if old[b] != 1]
    if more or (long and a != long[0]):
      refuse(op, f'axis {a} lies over {strip.axis!r} and is joined with an axis before it, of shape {old} to {new}')
    b = next((b for b in news if new[b] != 1), news[0] if news else None)
    if b is None:
      refuse(op, f'axis {a} of length 1 lies over {strip.axis!r} and goes')
    rest_old, rest_new = (
      math.prod(s[c] for c in cs) for s, cs in ((old, olds[olds.index(a) + 1 :]), (new, news[news.index(b) + 1 :]))
    )
    unit = rest_new // math.gcd(rest_old, rest_new)  # the fewest rows that make whole rows of the result
    better = strip if strip.unit % unit == 0 else strip._replace(unit=unit)
    x = moved(x, a, strip, better)
    strips[b] = Strip(strip.axis, strip.shards, new[b], better.unit * rest_old // rest_new)
    local[b] = strips[b].rows
  return [Value(x.reshape(local), tuple(strips))]


def stack(op: Op, inputs: list[Any]) -> list[Value]:
  """Stacks values along a new axis, an operation of newer versions of JAX."""
  values, axis = [on_device(v) for v in inputs], op.params['axis']
  strips = common(values, op)
  return [Value(jnp.stack(alike([laid(v, strips) for v in values]), axis), (*strips[:axis], None, *strips[axis:]))]


def unstack(op: Op, inputs: list[Any]) -> list[Value]:
  value, axis = on_device(inputs[0]), op.params['axis']
  if value.strips[axis] is not None:
    refuse(op, f'it takes axis {axis} apart, which lies over {value.strips[axis].axis!r}')
  strips = (*value.strips[:axis], *value.strips[axis + 1 :])
  return [Value(lax.index_in_dim(value.x, k, axis, keepdims=False), strips) for k in range(value.x.shape[axis])]


def groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
  """Groups the axes of the old shape with the axes of the new shape that they make, as few at a time as possible.

  Axes of length 1 go with those before them.
  """
  groups: list[tuple[list[int], list[int]]] = []
  i = j = 0
  while i < len(old) or j < len(new):
    olds, news = [i] if i < len(old) else [], [j] if j < len(new) else []
    i, j = i + len(olds), j + len(news)
    a, b = math.prod(old[k] for k in olds), math.prod(new[k] for k in news)
    while a != b:
      if a < b:
        a, i = a * old[i], i + 1
        olds.append(i - 1)
      else:
        b, j = b * new[j], j + 1
        news.append(j - 1)
    groups.append((olds, news))
  return groups


RULES = {
  'transpose': transpose,
  'broadcast_in_dim': broadcast_in_dim,
  'squeeze': squeeze,
  'expand_dims': expand_dims,
  'reshape': reshape,
  'stack': stack,
  'unstack': unstack,
}
