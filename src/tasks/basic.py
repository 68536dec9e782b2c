"""Tasks of one network on one input: reconstruction, classification, the next token, an equation.

A batch has these arrays; at evaluation it also has `mask` (b,), which is 0 for the examples that fill it up.
  reconstruct: inputs (b, ...) in [0, 1].
  classify: inputs (b, ...), label (b,), and with mixup target (b, classes) in the label's place.
  next_token: inputs (b, length), tokens.
  poisson: inputs (b, 2), points of the unit square; label (b,), the solution there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from .. import kron
from ..train import masked, mixing
from ..train.checkpoints import load_export
from ..train.errors import ConfigError
from ..train.registry import TASKS
from ..train.task import Task, apply, make_model


def make_task(config: Any, parts: int = 1) -> Task:
  """Makes the task that the config names; `parts` is for other tasks."""
  del parts
  model, entry = make_model(config), TASKS[config.task]
  return Task(model, LOSSES[config.task](model, config), entry.target, entry.lower_is_better)


def _reconstruction(model: nn.Module, config: Any) -> Callable:
  del config

  def loss(params, model_state, batch, train=True):
    pixels = batch['inputs'].reshape(batch['inputs'].shape[0], -1)
    logits, model_state = apply(model, params, model_state, batch['inputs'], train)
    logits = kron.observe.bernoulli(logits, pixels, mask=masked.counted(batch))
    value = masked.mean(optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1), batch)
    error = masked.mean(((jax.nn.sigmoid(logits) - pixels) ** 2).sum(-1), batch)
    return value, ({'loss': value, 'error': error}, model_state)

  return loss


def _classification(model: nn.Module, config: Any) -> Callable:
  smoothing, teacher = config.recipe.label_smoothing, read_teacher(config)
  share, hot = config.recipe.teacher_share, config.recipe.teacher_temperature

  def loss(params, model_state, batch, train=True):
    logits, model_state = apply(model, params, model_state, batch['inputs'], train)
    logits = kron.observe.categorical(logits, batch['label'], mask=masked.counted(batch))
    if train and (smoothing or 'target' in batch):
      target = mixing.soft_labels(batch, logits.shape[-1], smoothing)
      value = masked.mean(optax.softmax_cross_entropy(logits, target), batch)
    else:
      value = masked.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), batch)
    if train and teacher is not None:
      # Both networks' probabilities at a higher temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).
      wanted = jax.nn.softmax(jax.lax.stop_gradient(teacher(batch['inputs'])) / hot)
      value = (1 - share) * value + share * hot**2 * masked.mean(
        optax.softmax_cross_entropy(logits / hot, wanted), batch
      )
    accuracy = masked.mean(logits.argmax(-1) == batch['label'], batch)
    return value, ({'loss': value, 'accuracy': accuracy}, model_state)

  return loss


def read_teacher(config: Any) -> Callable[[jax.Array], jax.Array] | None:
  """Returns the logits of the network of the run `config.recipe.teacher`, as a function of inputs; None for none.

  Raises:
    ConfigError: that run has no export, is not a classifier's, or has other classes.
  """
  folder = config.recipe.teacher
  if not folder:
    return None
  variables, about = load_export(folder)
  theirs = ConfigDict(about['config'])
  if theirs.task != 'classify' or theirs.model.get('classes') != config.model.get('classes'):
    what = f'a run of {theirs.task!r} with {theirs.model.get("classes")} classes'
    raise ConfigError(f'config.recipe.teacher={folder!r} is {what}; it must be a classifier with the same classes')
  model, variables = make_model(theirs), jax.tree.map(jnp.asarray, variables)
  return lambda inputs: model.apply(variables, inputs, train=False)


def _next_token(model: nn.Module, config: Any) -> Callable:
  """Returns the loss of the next token, in nats per token.

  Every token of a window but the first is predicted from the tokens before it.
  """
  del config

  def loss(params, model_state, batch, train=True):
    tokens = batch['inputs']
    logits, model_state = apply(model, params, model_state, tokens[:, :-1], train)
    mask = None if 'mask' not in batch else jnp.broadcast_to(masked.counted(batch)[:, None], tokens[:, 1:].shape)
    logits = kron.observe.categorical(logits, tokens[:, 1:], mask=mask)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    value = masked.mean(each.mean(-1), batch)
    return value, ({'loss': value}, model_state)

  return loss


def _poisson(model: nn.Module, config: Any) -> Callable:
  """Returns the loss of a physics-informed network for the Poisson equation.

  The network is u = m(x) net(x), with -laplacian(u) = f in the unit square and u = 0 around it.
  m = 16 x (1 - x) y (1 - y) keeps the border exact. 'error' is |u - u*|^2 / |u*|^2 over the points (u* has mean square
  1/4, see `data.poisson_points`).
  """
  del config

  def loss(params, model_state, batch, train=True):
    def u(point):
      x, y = point
      return 16 * x * (1 - x) * y * (1 - y) * apply(model, params, model_state, point[None], train)[0][0, 0]

    def second(point, along):
      slope = lambda p: jax.jvp(u, (p,), (along,))[1]  # noqa: E731
      return jax.jvp(slope, (point,), (along,))[1]

    def laplacian(point):
      return second(point, jnp.array([1.0, 0.0])) + second(point, jnp.array([0.0, 1.0]))

    points = batch['inputs']
    # The right side is 5 pi^2 times the solution. Dividing by that makes residuals as large as the solution.
    scale = 5 * jnp.pi**2
    residual = jax.vmap(laplacian)(points) / scale + batch['label']
    residual = kron.observe.gaussian(residual[:, None], mask=masked.counted(batch))
    value = masked.mean(0.5 * residual[:, 0] ** 2, batch)
    error = masked.mean((jax.vmap(u)(points) - batch['label']) ** 2, batch) * 4
    return value, ({'loss': value, 'error': error}, model_state)

  return loss


LOSSES = {
  'reconstruct': _reconstruction,
  'classify': _classification,
  'next_token': _next_token,
  'poisson': _poisson,
}
