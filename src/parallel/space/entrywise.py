"""Gives rules for elementwise operations, and for operations that act along axes that are not in strips."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from ...program import CASTS, ENTRYWISE, Op
from .values import Value, beside, bound, common, laid, on_device, refuse


def entrywise(op: Op, inputs: list[Any]) -> list[Value]:
  """Runs an elementwise operation with all operands in the strips of the first operand that has strips."""
  values = [on_device(v) for v in inputs]
  shape = op.outputs[0].shape
  strips = common([v for v in values if len(v.strips) == len(shape)], op)
  parts = [beside(v, strips, shape) if len(v.strips) == len(shape) else v.x for v in values]
  return [Value(x, strips) for x in bound(op, parts)]


def constrained(op: Op, value: Value) -> Value:
  """Applies a sharding constraint on axes of the mesh that are left to the compiler."""
  spec = op.params['sharding'].spec
  current = jax.sharding.get_abstract_mesh()
  if set(current.manual_axes) == set(current.axis_names):
    return value
  return value._replace(x=jax.lax.with_sharding_constraint(value.x, PartitionSpec(*spec)))


# The operations that act along some axes alone, with the name of the parameter that holds these axes.
_ALONG = {
  'argmax': 'axes', 'argmin': 'axes', 'cumlogsumexp': 'axis', 'cummax': 'axis', 'cummin': 'axis', 'cumprod': 'axis',
  'cumsum': 'axis', 'reverse': 'dimensions', 'sort': 'dimension', 'split': 'axis',
}  # fmt: skip


def along_others(op: Op, inputs: list[Any]) -> list[Value]:
  """Runs an operation as it is if the axes along which it acts are whole."""
  value = on_device(inputs[0])
  axes = op.params[_ALONG[op.name]]
  axes = tuple(axes) if isinstance(axes, tuple | list) else (axes,)
  for dim, strip in value.dims:
    if dim in axes:
      refuse(op, f'it acts along axis {dim}, which lies over {strip.axis!r}')
  values = [on_device(v) for v in inputs]
  strips = common(values, op)
  gone = axes if op.name.startswith('arg') else ()
  kept = tuple(s for dim, s in enumerate(strips) if dim not in gone)
  return [Value(x, kept) for x in bound(op, [laid(v, strips) for v in values])]


def used(op: Op, inputs: list[Any]) -> list[Value]:
  """Runs the loss's marks of uses (`kron.used`) on strips; padding does not count as a use."""
  value, where = (on_device(v) for v in inputs)
  if where.whole and not all(s.even for _, s in value.dims):
    refuse(op, 'its mask does not lie in strips as its input does')
  return [Value(bound(op, [value.x, where.x])[0], value.strips)]


def top_k(op: Op, inputs: list[Any]) -> list[Value]:
  value = on_device(inputs[0])
  last = len(value.strips) - 1
  if value.strips[last] is not None:
    refuse(op, f'it acts along axis {last}, which lies over {value.strips[last].axis!r}')
  return [Value(x, value.strips) for x in bound(op, [value.x])]


RULES = {
  **dict.fromkeys(ENTRYWISE | frozenset(CASTS) | {'stop_gradient', 'erf_inv', 'is_finite', 'tan'}, entrywise),
  **dict.fromkeys(_ALONG, along_others),
  'top_k': top_k,
  'kron_used': used,
}
