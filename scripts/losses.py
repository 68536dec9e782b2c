"""A classifier's loss with its shapes, for scripts that compile but never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kronmesh import kron


def problem(model: nn.Module, size: int, batch: int = 8) -> tuple[Callable, Any, tuple]:
  """Returns a loss, its parameters' shapes and its arguments' shapes, without computing anything."""
  x, y = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
  variables = nn.meta.unbox(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x))
  params = variables.pop('params')

  def loss(params, x, y, key, state):
    del key
    logits, state = model.apply({'params': params, **state}, x, train=True, mutable=['batch_stats'])
    logits = kron.observe.categorical(logits, y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

  return loss, params, (x, y, jax.eval_shape(lambda: jax.random.key(0)), variables)
