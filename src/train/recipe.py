"""Options of a run's recipe that act on parameters and gradients: weight rescaling, clipping, averages.

Weight rescaling comes from SP-NGD (Osawa et al. 2020, arXiv:2002.06015, section 5).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import kron
from .errors import ConfigError


def check(config: Any) -> None:
  """Raises ConfigError for options that do not work together, or not with this optimiser."""
  settings, optimizer = config.recipe, config.optimizer
  if settings.mixup and settings.cutmix:
    raise ConfigError('config.recipe has mixup and cutmix; set one to 0')
  if optimizer in ('adaptive_kfac', 'natural_gradient'):  # these evaluate the loss themselves, on the whole batch
    for name, value, none in (('microbatches', config.microbatches, 1), ('recipe.loss_scale', settings.loss_scale, 0)):
      if value != none:
        raise ConfigError(
          f'config.{name}={value:g} does not work with config.optimizer={optimizer!r}; set it to {none}'
        )


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
  """Raises ConfigError for a pattern of `rescale_weights` that matches no parameter."""
  for pattern in patterns:
    if not any(fnmatch.fnmatch(name, str(pattern)) for name in names):
      raise ConfigError(
        f'recipe.rescale_weights={pattern!r} matches no parameter; there are {", ".join(names[:6])} ...'
      )


def rescale_weights(patterns: Sequence[str]) -> optax.GradientTransformation:
  """Makes the last link of a chain, which keeps the norm of matching parameters at sqrt(2 d_out) (eq. 21).

  It rescales them after every step. Use it for kernels whose scale is cancelled by a norm behind them; d_out is the
  length of their last axis.
  """

  def update(updates, state, params=None):
    names = kron.param_names(params)

    def one(name: str, u: Array, p: Array) -> Array:
      if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
        return u
      new = p + u
      return new * (math.sqrt(2 * p.shape[-1]) / (jnp.linalg.norm(new.reshape(-1)) + 1e-9)) - p

    treedef = jax.tree.structure(updates)
    leaves = [one(*x) for x in zip(names, jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)]
    return treedef.unflatten(leaves), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clipped(tx: optax.GradientTransformation, norm: float) -> optax.GradientTransformationExtraArgs:
  """Returns a transformation that first clips the norm over all gradients to `norm`; 0 does not clip."""
  return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(norm), tx) if norm else tx)


def averaged(average: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
  """Returns the new moving average, whose decay is at most (1 + t) / (10 + t), to follow the parameters early on."""
  return optax.incremental_update(params, average, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))
