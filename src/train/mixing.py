"""Mixup, running mixup, cutmix over time, and smoothed labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

_MIXING = 0x6D6978  # folded into a step's key


def soft_labels(batch: dict[str, Array], classes: int, smoothing: float) -> Float[Array, 'b classes']:
  """Returns the batch's targets, mixed or one-hot, with the share `smoothing` spread over all classes."""
  target = batch['target'] if 'target' in batch else jax.nn.one_hot(batch['label'], classes)
  return (1 - smoothing) * target + smoothing / classes


def mix(
  batch: dict[str, Array],
  previous: PyTree,
  key: PRNGKeyArray,
  *,
  alpha: float,
  cut: float,
  running: bool,
  classes: int,
) -> tuple[dict[str, Array], PyTree]:
  """Mixes the images and targets of a batch by mixup or by cutmix.

  Mixup takes weighted means of two examples, with the weight drawn from Beta(alpha, alpha). Cutmix over time takes a
  run of frames from another clip and weights the targets by the number of frames (VideoMix, Yun et al. 2020, section
  3.2).

  Args:
    batch: 'inputs' and 'label'.
    previous: the second result of the last call, or zeros of that shape before the first.
    alpha: the parameter of mixup, 0 for no mixup.
    cut: the alpha of cutmix, 0 for no cutmix; images are then clips, (b, t, h, w, c).
    running: whether the partner is the last *mixed* batch (running mixup, eq. 18) and not another example of this one.

  Returns:
    The batch with 'target', (b, classes), and what the next call needs.
  """
  if not (alpha or cut):
    return batch, previous
  key = jax.random.fold_in(key, _MIXING)
  weight = jax.random.beta(key, alpha or cut, alpha or cut)
  targets = {'inputs': batch['inputs'], 'target': jax.nn.one_hot(batch['label'], classes)}
  if cut:
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(batch['label']))
    time = jnp.arange(batch['inputs'].shape[1])
    length = jnp.round((1 - weight) * time.size)
    start = jnp.floor(jax.random.uniform(jax.random.fold_in(key, 2)) * (time.size - length + 1))
    other = ((time >= start) & (time < start + length))[:, None, None, None]
    image = jnp.where(other, targets['inputs'][order], targets['inputs'])
    share = length / time.size
    return {
      **batch,
      'inputs': image,
      'target': (1 - share) * targets['target'] + share * targets['target'][order],
    }, previous
  if running:
    weight = jnp.where(previous['target'].sum() > 0, jnp.maximum(weight, 1 - weight), 1.0)
    partner = previous
  else:
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(batch['label']))
    partner = jax.tree.map(lambda x: x[order], targets)
  mixed = jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, targets, partner)
  return {**batch, **mixed}, mixed if running else previous


def nothing_mixed(config: Any, image: jax.ShapeDtypeStruct) -> PyTree:
  """Returns what `mix` takes as `previous` before the first step: nothing, or an empty running batch."""
  if not (config.recipe.mixup and config.recipe.running_mixup):
    return ()
  return {'inputs': jnp.zeros(image.shape, image.dtype), 'target': jnp.zeros((image.shape[0], config.model.classes))}
