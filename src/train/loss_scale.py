"""A loss scale for float16: the loss is multiplied before its gradient, and gradients are divided after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import kron


def scaled(config: Any, loss: Callable) -> Callable:
  """Returns the loss, multiplied by the scale that is passed beside the model's state if the config has one."""
  if not config.recipe.loss_scale:
    return loss

  def times(params, carried, batch, train=True):
    model_state, scale = carried
    value, aux = loss(params, model_state, batch, train)
    return value.astype(jnp.float32) * scale, aux

  return times


def carried(config: Any, model_state: PyTree, scale: Any = None) -> PyTree:
  """Returns what a scaled loss takes as the model's state."""
  if not config.recipe.loss_scale:
    return model_state
  return model_state, jax.ShapeDtypeStruct((), jnp.float32) if scale is None else scale


def unscaled(
  grads: PyTree, extra: dict[str, Any], scale: Float[Array, ''], curvature: kron.Curvature | None
) -> tuple[PyTree, dict[str, Any]]:
  """Returns gradients and statistics without the loss scale; statistics of drawn targets do not come from the loss."""
  grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
  if extra.get('stats') is not None and curvature.fisher == 'empirical':
    extra = {**extra, 'stats': extra['stats'].of_loss_times(1 / scale)}
  return grads, extra
