"""What training with large batches needs beside the optimiser: schedules, weight rescaling, mixup.

The parts of SP-NGD (Osawa et al. 2020, arXiv:2002.06015, sections 5 and 6), each an option of the config.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from experiments.errors import ConfigError
from kronmesh import kron

SCALINGS = {'none': lambda ratio: 1.0, 'linear': lambda ratio: ratio, 'sqrt': math.sqrt}
SCHEDULES = ('constant', 'cosine', 'polynomial')
_MIXING = 0x6D6978  # folded into a step's key


def learning_rate(own: Any, config: Any) -> optax.Schedule:
  """The schedule of an optimiser's section: scaled by the batch, after a linear warm-up constant, cosine or polynomial.

  Raises:
    ConfigError: an unknown name, or a warm-up as long as the run.
  """
  if own.warmup_steps >= config.steps:
    raise ConfigError(f'{config.optimizer}.warmup_steps={own.warmup_steps} leaves nothing of steps={config.steps}')
  if config.recipe.rate_scaling not in SCALINGS:
    raise ConfigError(
      f'recipe.rate_scaling={config.recipe.rate_scaling!r} is unknown; choose from {", ".join(SCALINGS)}'
    )
  peak_rate = peak(own, config)
  left = config.steps - own.warmup_steps
  if own.schedule == 'constant':
    after = optax.constant_schedule(peak_rate)
  elif own.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak_rate, left, alpha=0.01)
  elif own.schedule == 'polynomial':
    after = optax.polynomial_schedule(peak_rate, 0.01 * peak_rate, own.power, left)
  else:
    raise ConfigError(f'{config.optimizer}.schedule={own.schedule!r} is unknown; choose from {", ".join(SCHEDULES)}')
  if not own.warmup_steps:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak_rate, own.warmup_steps), after], [own.warmup_steps])


def peak(own: Any, config: Any) -> float:
  """The largest learning rate: the section's own, scaled by the batch."""
  return own.learning_rate * SCALINGS[config.recipe.rate_scaling](
    config.data.batch_size / config.recipe.reference_batch
  )


def momentum(own: Any, rate: optax.Schedule, peak: float) -> optax.ScalarOrSchedule:
  """The section's momentum, or with `momentum_follows_rate` the same share of its peak as the learning rate (eq. 19)."""
  if not own.get('momentum_follows_rate'):
    return own.momentum
  return lambda count: own.momentum * rate(count) / peak


def rescale_weights(patterns: Sequence[str]) -> optax.GradientTransformation:
  """The last link of a chain: parameters of these names keep the norm sqrt(2 d_out) after every step (eq. 21).

  For kernels whose scale a norm behind them cancels; d_out is the length of their last axis.
  """

  def update(updates, state, params=None):
    names = kron.param_names(params)
    for pattern in patterns:
      if not any(fnmatch.fnmatch(name, pattern) for name in names):
        raise ConfigError(f'recipe.rescale_weights={pattern!r} fits no parameter; there are {", ".join(names[:6])} ...')

    def one(name: str, u: Array, p: Array) -> Array:
      if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
        return u
      new = p + u
      return new * (math.sqrt(2 * p.shape[-1]) / (jnp.linalg.norm(new.reshape(-1)) + 1e-9)) - p

    treedef = jax.tree.structure(updates)
    leaves = [one(*x) for x in zip(names, jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)]
    return treedef.unflatten(leaves), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def soft_labels(batch: dict[str, Array], classes: int, smoothing: float) -> Float[Array, 'b classes']:
  """The batch's targets: mixed ones, or one-hot; the share `smoothing` is spread over all classes."""
  target = batch['target'] if 'target' in batch else jax.nn.one_hot(batch['label'], classes)
  return (1 - smoothing) * target + smoothing / classes


def mix(
  batch: dict[str, Array], previous: PyTree, key: PRNGKeyArray, *, alpha: float, running: bool, classes: int
) -> tuple[dict[str, Array], PyTree]:
  """Mixup: images and targets become weighted means of two, the weight drawn from Beta(alpha, alpha).

  Args:
    batch: 'image' and 'label'.
    previous: what the last call returned second, or zeros of that shape before the first.
    alpha: 0 for no mixing.
    running: the partner is the last *mixed* batch (running mixup, eq. 18), not another example of this one.

  Returns:
    The batch with 'target', (b, classes), and what the next call needs.
  """
  if not alpha:
    return batch, previous
  key = jax.random.fold_in(key, _MIXING)
  weight = jax.random.beta(key, alpha, alpha)
  own = {'image': batch['image'], 'target': jax.nn.one_hot(batch['label'], classes)}
  if running:
    weight = jnp.where(previous['target'].sum() > 0, jnp.maximum(weight, 1 - weight), 1.0)
    partner = previous
  else:
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(batch['label']))
    partner = jax.tree.map(lambda x: x[order], own)
  mixed = jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, own, partner)
  return {**batch, **mixed}, mixed if running else previous


def nothing_mixed(config: Any, image: jax.ShapeDtypeStruct) -> PyTree:
  """What `mix` needs before the first step: nothing, or an empty running batch."""
  if not (config.recipe.mixup and config.recipe.running_mixup):
    return ()
  return {'image': jnp.zeros(image.shape, image.dtype), 'target': jnp.zeros((image.shape[0], config.model.classes))}
