"""Microbatches: a batch in pieces, and gradients and statistics added up over them."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def divide(batch: dict[str, Array], count: int, shardings: dict[str, jax.sharding.NamedSharding]) -> PyTree:
  """Divides the batch into `count` microbatches, (count, b / count, ...), with equally many examples of every shard.

  shardings: the shardings of the arrays, by name; any other array has that of 'label'.
  """

  def divide(x: Array, sharding: jax.sharding.NamedSharding) -> Array:
    axes, *rest = sharding.spec or (None,)
    shards = math.prod(sharding.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
    parts = jnp.swapaxes(x.reshape(shards, count, -1, *x.shape[1:]), 0, 1).reshape(count, -1, *x.shape[1:])
    where = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, axes, *rest))
    return jax.lax.with_sharding_constraint(parts, where)

  return {name: divide(x, shardings.get(name, shardings['label'])) for name, x in batch.items()}


def add_up(one: Callable, model_state: PyTree, parts: PyTree, count: int) -> tuple[PyTree, tuple]:
  """Runs `one` on all microbatches, averaging the metrics and gradients and summing the statistics.

  one: takes (model state, (number, microbatch)).
  """
  numbered = (jnp.arange(count), parts)
  shapes = jax.eval_shape(one, model_state, jax.tree.map(lambda x: x[0], numbered))[1]

  def body(carry, part):
    model_state, sums = carry
    model_state, outcome = one(model_state, part)
    return (model_state, jax.tree.map(jnp.add, sums, outcome)), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (model_state, (metrics, grads, stats)), _ = jax.lax.scan(body, (model_state, zeros), numbered)
  return model_state, (*jax.tree.map(lambda x: x / count, (metrics, grads)), stats)
