"""Support for Explicit mesh axes: kron computes as under Auto axes and states the sharding types of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from ..program import vary, varying


def explicit() -> bool:
  """Returns whether the current mesh (`jax.set_mesh`) has Explicit axes."""
  return any(t == AxisType.Explicit for t in jax.sharding.get_abstract_mesh().axis_types)


def automatic(fn: Callable, out: Any) -> Callable:
  """Returns `fn` with all axes Auto inside and results sharded as `out`, a PartitionSpec or a tree of them."""
  return jax.sharding.auto_axes(fn, out_sharding=out) if explicit() else fn


def spec_of(x: Array) -> PartitionSpec:
  """Returns the sharding in an array's type."""
  return jax.typeof(x).sharding.spec


def typed(x: Array, spec: PartitionSpec) -> Array:
  """Reshards an array to this spec under Explicit axes; elsewhere returns it unchanged."""
  return jax.sharding.reshard(x, spec) if explicit() else x


def typed_as(x: Array, like: Array) -> Array:
  """Gives an array the type of `like`: its sharding under Explicit axes, else the shard_map axes it varies over."""
  return jax.sharding.reshard(x, spec_of(like)) if explicit() else vary(x, varying(like))


def typed_update(update: Callable) -> Callable:
  """Wraps an optax update so that gradients and state keep their types."""

  def wrapped(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    if not explicit():
      return update(updates, state, params, **extra)
    arrays = {name: extra.pop(name) for name in ('stats', 'damping') if extra.get(name) is not None}
    run = lambda updates, state, params, arrays: update(updates, state, params, **extra, **arrays)  # noqa: E731
    return automatic(run, jax.tree.map(spec_of, (updates, state)))(updates, state, params, arrays)

  return wrapped
