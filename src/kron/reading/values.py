"""Facts about values and operations that the rules of `weight_rules.py` and `kernels.py` need."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ...program import CASTS, ENTRYWISE, Op, Program, Ref, concrete, has_mark, is_known
from .sites import DATA, INPUT, Walk


def is_data(kind: Any) -> bool:
  return kind in (DATA, INPUT)


def differentiable(v: Ref) -> bool:
  return jnp.issubdtype(v.dtype, jnp.inexact)


def constant(value: Any, walk: Walk) -> Any:
  """Returns the number or array that the program itself gives this value, or None."""
  if not isinstance(value, Ref):
    return np.asarray(value)
  if value.index in walk.survey.consts:
    known = walk.survey.consts[value.index]
    return np.asarray(known) if is_known(known) and not differentiable(value) else None
  op = walk.survey.makers.get(value.index)
  if op is None or differentiable(value) or op.region is not None or len(op.outputs) > 1 or op.name == 'axis_index':
    return None
  if op.name in ('pvary', 'pcast'):
    return constant(op.inputs[0], walk)
  operands = [constant(v, walk) for v in op.inputs]
  return None if any(v is None for v in operands) else np.asarray(concrete(op, operands)[0])


def closed_over(value: Any, walk: Walk) -> bool:
  """Returns whether a constant depends on an array that the program holds, which may be part of the batch."""
  if not isinstance(value, Ref) or value.index in walk.survey.consts:
    return isinstance(value, Ref)
  op = walk.survey.makers.get(value.index)
  return op is None or any(closed_over(v, walk) for v in op.inputs)


def is_entrywise(op: Op) -> bool:
  """Returns whether each entry of the result depends only on the same entry of the operands."""
  if op.name == 'custom_jvp_call':
    return all(is_entrywise(inner) for inner in op.bodies[0].ops)
  return op.name in ENTRYWISE


def holds_mark(program: Program) -> bool:
  return any(has_mark(op) for op in program.ops)


def is_zero(value: Any, walk: Walk) -> bool:
  if not isinstance(value, Ref):
    return not np.any(value)
  op = walk.survey.makers.get(value.index)
  return op is not None and op.name in (*CASTS, 'broadcast_in_dim') and is_zero(op.inputs[0], walk)


def varying_axes(value: Any, walk: Walk) -> set[int]:
  """Returns the axes along which an array's entries may differ."""
  if not isinstance(value, Ref):
    return set()
  long = {a for a, size in enumerate(value.shape) if size != 1}
  op = walk.survey.makers.get(value.index)
  if op is None or not long:
    return long
  if op.name == 'broadcast_in_dim':
    dims, old = (
      op.params['broadcast_dimensions'],
      jnp.shape(op.inputs[0]) if not isinstance(op.inputs[0], Ref) else op.inputs[0].shape,
    )
    return {dims[a] for a in varying_axes(op.inputs[0], walk) if old[a] == value.shape[dims[a]]}
  if is_entrywise(op) and all(not isinstance(v, Ref) or len(v.shape) in (0, len(value.shape)) for v in op.inputs):
    return set().union(*(varying_axes(v, walk) for v in op.inputs))
  return long


def is_one_hot(value: Any, axes: tuple[int, ...], walk: Walk) -> bool:
  """Returns whether data are one-hot along an axis, made by a comparison with the indices of that axis."""
  if len(axes) != 1 or not isinstance(value, Ref):
    return False
  (axis,) = axes
  op = walk.survey.makers.get(value.index)
  while op is not None and op.name in CASTS:
    op = walk.survey.makers.get(op.inputs[0].index)
  if op is None or op.name != 'eq':
    return False
  counts = [_counts(v, axis, walk) for v in op.inputs]
  fixed = [axis not in varying_axes(v, walk) for v in op.inputs]
  return (counts[0] and fixed[1]) or (counts[1] and fixed[0])


def _counts(value: Any, axis: int, walk: Walk) -> bool:
  """Returns whether a value counts 0, 1, 2... along an axis."""
  op = walk.survey.makers.get(value.index) if isinstance(value, Ref) else None
  if op is None:
    return False
  if op.name == 'iota':
    return op.params['dimension'] == axis
  if op.name == 'broadcast_in_dim' and axis in op.params['broadcast_dimensions']:
    return _counts(op.inputs[0], op.params['broadcast_dimensions'].index(axis), walk)
  return op.name in CASTS and _counts(op.inputs[0], axis, walk)
