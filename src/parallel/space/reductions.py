"""Runs reductions such as sums: unchanged over whole axes, and with an all-reduce over axes in strips."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ...program import Op, bind
from .halo import MICROBATCH, cleared
from .values import Value, on_device, refuse, summed


def reduce(op: Op, inputs: list[Any]) -> list[Value]:
  value = on_device(inputs[0])
  axes = op.params['axes']
  over = [(dim, s) for dim, s in value.dims if dim in axes]
  x = value.x
  if any(s.axis == MICROBATCH for _, s in over):
    refuse(op, 'it puts examples together, and a pipeline has some of them at a time')
  for dim, strip in over:
    x = cleared(x, dim, strip, neutral(op.name, x.dtype))
  kept = tuple(s for dim, s in enumerate(value.strips) if dim not in axes)
  names = tuple(s.axis for _, s in over)
  if op.name in ('reduce_max', 'reduce_min') and names:
    return [Value(_extreme(x, tuple(axes), names, op.name == 'reduce_max'), kept)]
  (y,) = bind(op, x)
  if names and op.name in ('reduce_sum', 'reduce_prod'):
    if op.name == 'reduce_prod':
      refuse(op, f'a product over an axis that lies over {names[0]!r} has no all-reduce')
    y = summed(y, names)
  elif names:  # reduce_and, reduce_or
    counts = lax.psum(y.astype(jnp.int32), names)
    y = counts == int(np.prod([s.shards for _, s in over])) if op.name == 'reduce_and' else counts > 0
  return [Value(y, kept)]


def neutral(name: str, dtype: Any) -> Any:
  """Returns the neutral element of a reduction."""
  if name in ('reduce_max', 'reduce_min'):
    info = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype)
    infinite = jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else info.max
    return (-infinite if jnp.issubdtype(dtype, jnp.inexact) else info.min) if name == 'reduce_max' else infinite
  return {'reduce_sum': 0, 'reduce_prod': 1, 'reduce_and': True, 'reduce_or': False}[name]


def _extreme(x: Array, axes: tuple[int, ...], names: tuple[str, ...], largest: bool) -> Array:
  """Returns the largest (smallest) entries over axes of the array and of the mesh; equal ones share the gradient."""
  best = jnp.max if largest else jnp.min
  reach = lax.pmax if largest else lax.pmin

  def found(x: Array) -> Array:
    return reach(best(x, axes), names)

  @jax.custom_jvp
  def extreme(x):
    return found(x)

  @extreme.defjvp
  def _(primals, tangents):
    (x,), (t,) = primals, tangents
    y = found(x)
    at = x == jnp.expand_dims(y, axes)
    total = summed(jnp.where(at, t, jnp.zeros((), t.dtype)).sum(axes), names)
    return y, total / lax.psum(at.sum(axes), names).astype(t.dtype)

  return extreme(x)


RULES = dict.fromkeys(('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or'), reduce)
