"""Functions that run operations again as JAX traced them, with their contexts, source lines and derivative rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import source_info_util

from .ops import Op, Ref
from .program import trace


def bind(op: Op, *values: Any, **changed: Any) -> list[Any]:
  """Applies the operation to other values as JAX traced it, derivative rules included; `changed` sets parameters."""
  params = op.eqn.primitive.get_bind_params({**op.params, **changed})
  subfuns: Sequence[Any] = ()
  if isinstance(params, tuple):  # before jax 0.10: (functions, params)
    subfuns, params = params
  with at(op), context(op):
    out = op.eqn.primitive.bind(*subfuns, *values, **params)
  return list(out) if op.eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(op: Op) -> Iterator[None]:
  """Restores the contexts that JAX recorded when it traced an operation: compute_on, threefry, XLA metadata.

  The mesh is restored only where it differs from that of the program around the operation, because a program may run
  inside a shard_map that it was not traced in.
  """
  mesh = jax.sharding.get_abstract_mesh()
  with op.eqn.ctx.manager, contextlib.nullcontext() if op.own_mesh else jax.sharding.use_abstract_mesh(mesh):
    yield


@contextlib.contextmanager
def at(op: Op) -> Iterator[None]:
  """Gives traced code the operation's line and scopes, so that profiles and compiled programs still name them."""
  source, scopes = op.eqn.source_info, source_info_util.current_name_stack()
  inside = str(scopes).endswith(str(source.name_stack))
  with source_info_util.user_context(source.traceback, name_stack=scopes if inside else scopes + source.name_stack):
    yield


def concrete(op: Op, values: Sequence[Any]) -> list[Any]:
  """Computes an operation on known numbers immediately, even while an outer function is traced."""
  with jax.ensure_compile_time_eval():
    return bind(op, *values)


def is_known(value: Any) -> bool:
  """Returns whether a constant of a program is a number now, and not an outer transformation's tracer."""
  return not isinstance(value, jax.core.Tracer)


def passes_gradient(op: Op, position: int) -> bool:
  """Returns whether the function's derivative rule passes the gradient of its only result to an operand unchanged."""
  primals = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Ref) else v for v in op.inputs]
  value = primals[position]
  if value.shape != op.outputs[0].shape or value.dtype != op.outputs[0].dtype:
    return False

  def pulled(slope: Any, *values: Any) -> Any:
    full = list(values)
    _, pull = jax.vjp(lambda x: bind(op, *full[:position], x, *full[position + 1 :])[0], full[position])
    return pull(slope)[0]

  try:
    body, _ = trace(pulled, value, *primals)
  except (NameError, TypeError, ValueError):  # the rule cannot be read out of context, as with collectives
    return False
  return body.outputs[0] is body.inputs[0]


def varying(x: Any) -> frozenset[str]:
  """Returns the mesh axes along which a value differs inside a shard_map; elsewhere, none."""
  return getattr(getattr(jax.typeof(x), 'manual_axis_type', None), 'varying', frozenset())


def vary(x: Any, axes: frozenset[str]) -> Any:
  """Marks `x` as differing along these mesh axes too; its cotangent is summed over them."""
  missing = tuple(sorted(axes - varying(x)))
  return jax.lax.pcast(x, missing, to='varying') if missing else x
