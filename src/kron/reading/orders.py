"""Tests whether an order in which a program reads a kernel is an order of the kernel's rows or of examples."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...program import Op, Ref, bind
from .sites import Walk


def summed_over(value: Ref, axis: int, walk: Walk, origin: Ref | None = None) -> bool:
  """Returns whether a product sums over an axis of a value; the axis then counts rows of a kernel, not examples.

  The value is followed through all operations before it meets data. origin: the value where the search began.
  """
  origin = origin or value
  for op in walk.survey.readers.get(value.index, ()):
    if op is None:
      continue
    sides = [side for side, v in enumerate(op.inputs) if isinstance(v, Ref) and v.index == value.index]
    if op.name == 'dot_general' and any(axis in op.params['dimension_numbers'][0][side] for side in sides):
      return True
    if op.name == 'conv_general_dilated' and sides == [1] and axis != op.params['dimension_numbers'].rhs_spec[0]:
      return True
    others = [v for side, v in enumerate(op.inputs) if side not in sides]
    if all(_without_data(v, walk, origin) for v in others) and any(
      summed_over(op.outputs[0], moved, walk, origin) for moved in _along(op, sides[0], axis)
    ):
      return True
  return False


def _without_data(value: Any, walk: Walk, origin: Ref) -> bool:
  """Returns whether a value depends on `origin` and the program's constants alone."""
  if not isinstance(value, Ref) or value == origin or value.index in walk.survey.consts:
    return True
  op = walk.survey.makers.get(value.index)
  return op is not None and all(_without_data(v, walk, origin) for v in op.inputs)


def _along(op: Op, side: int, axis: int) -> list[int]:
  """Returns the axes along which an operand's axis continues in the result, if entries are only moved or changed."""
  old, new = op.inputs[side].shape, op.outputs[0].shape
  if op.name == 'gather':
    numbers = op.params['dimension_numbers']
    kept = [a for a in range(len(old)) if a not in numbers.collapsed_slice_dims]
    return [numbers.offset_dims[kept.index(axis)]] if side == 0 and axis in kept else []
  if op.name == 'transpose':
    return [op.params['permutation'].index(axis)]
  if op.name == 'broadcast_in_dim':
    return [op.params['broadcast_dimensions'][axis]]
  if op.name == 'reshape':  # the axes with strides between those of this axis and the axis before it
    low, high = math.prod(old[axis + 1 :]), math.prod(old[axis:])
    return [a for a in range(len(new)) if math.prod(new[a + 1 :]) < high and math.prod(new[a:]) > low]
  if op.name == 'squeeze':
    return [axis - sum(d < axis for d in op.params['dimensions'])] if axis not in op.params['dimensions'] else []
  return [axis] if len(new) == len(old) else []


def picks_once(op: Op, places: list[Any], shape: tuple[int, ...]) -> bool:
  """Returns whether no entry is picked twice and no fill value stands for entries outside."""
  with jax.ensure_compile_time_eval():
    numbers = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.int32).reshape(shape)
    like = lambda v: v.astype(numbers.dtype) if op.name == 'pad' else v  # noqa: E731
    positions = np.asarray(bind(op, numbers, *map(like, places))[0]).reshape(-1)
  return bool((positions > 0).all()) and len(np.unique(positions)) == len(positions)
