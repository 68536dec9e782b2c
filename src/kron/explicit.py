"""Explicit mesh axes, where types have shardings: kron computes as under Auto axes and states the types of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from ..program import vary, varying


def explicit() -> bool:
  """Whether the mesh in force (`jax.set_mesh`) has Explicit axes."""
  return any(t == AxisType.Explicit for t in jax.sharding.get_abstract_mesh().axis_types)


def automatic(fn: Callable, out: Any) -> Callable:
  """`fn` with all axes Auto inside, its results of the types that `out` says: a PartitionSpec, or a tree of them."""
  return jax.sharding.auto_axes(fn, out_sharding=out) if explicit() else fn


def spec_of(x: Array) -> PartitionSpec:
  """The sharding in an array's type."""
  return jax.typeof(x).sharding.spec


def typed(x: Array, spec: PartitionSpec) -> Array:
  """An array of that type, where types have shardings."""
  return jax.sharding.reshard(x, spec) if explicit() else x


def typed_as(x: Array, like: Array) -> Array:
  """An array of another's type: sharded so under Explicit axes, and varying over the same axes of a shard_map."""
  return jax.sharding.reshard(x, spec_of(like)) if explicit() else vary(x, varying(like))


def typed_update(update: Callable) -> Callable:
  """An optax update that keeps the types of gradients and state."""

  def wrapped(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    if not explicit():
      return update(updates, state, params, **extra)
    arrays = {name: extra.pop(name) for name in ('stats', 'damping') if extra.get(name) is not None}
    run = lambda updates, state, params, arrays: update(updates, state, params, **extra, **arrays)  # noqa: E731
    return automatic(run, jax.tree.map(spec_of, (updates, state)))(updates, state, params, arrays)

  return wrapped
