"""Tasks by name: a model, its loss and the metrics reported with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

from experiments.errors import ConfigError
from kronmesh import kron, models


class Task(NamedTuple):
  """`loss(params, model_state, batch, train)` -> (loss, (metrics, new model state)).

  target: the metric that the task is about, and whether less of it is better.
  """

  model: nn.Module
  loss: Callable
  target: str
  lower_is_better: bool


def make_task(config: Any) -> Task:
  """The config's task.

  Raises:
    ConfigError: an unknown task or model.
  """
  model = _make_model(config)
  if config.task == 'reconstruct':
    return Task(model, _reconstruction(model), 'error', True)
  if config.task == 'classify':
    return Task(model, _classification(model), 'accuracy', False)
  raise ConfigError(f"config.task={config.task!r} is unknown; choose 'reconstruct' or 'classify'")


def _make_model(config: Any) -> nn.Module:
  settings = config.model.to_dict()
  name = settings.pop('name')
  classes = {'autoencoder': models.Autoencoder, 'mlp': models.MLP, 'resnet': models.ResNet}
  if name not in classes:
    raise ConfigError(f'config.model.name={name!r} is unknown; choose from {", ".join(classes)}')
  settings['dtype'] = jnp.dtype(settings.get('dtype', 'float32'))
  return classes[name](**settings)


def _apply(model: nn.Module, params: Any, model_state: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
  variables = {'params': params, **model_state}
  if train and model_state:
    return model.apply(variables, images, train=True, mutable=list(model_state))
  return model.apply(variables, images, train=train), model_state


def _mean(values: Num[Array, 'b'], batch: dict[str, jax.Array]) -> Float[Array, '']:
  """Over the examples of the batch; what fills up a last batch has mask 0."""
  if 'mask' not in batch:
    return values.mean()
  return (values * batch['mask']).sum() / batch['mask'].sum()


def _reconstruction(model: nn.Module) -> Callable:
  def loss(params, model_state, batch, train=True):
    pixels = batch['image'].reshape(batch['image'].shape[0], -1)
    logits, model_state = _apply(model, params, model_state, batch['image'], train)
    logits = kron.observe.bernoulli(logits, pixels, mask=batch.get('mask'))
    value = _mean(optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1), batch)
    error = _mean(((jax.nn.sigmoid(logits) - pixels) ** 2).sum(-1), batch)
    return value, ({'loss': value, 'error': error}, model_state)

  return loss


def _classification(model: nn.Module) -> Callable:
  def loss(params, model_state, batch, train=True):
    logits, model_state = _apply(model, params, model_state, batch['image'], train)
    logits = kron.observe.categorical(logits, batch['label'], mask=batch.get('mask'))
    value = _mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), batch)
    accuracy = _mean(logits.argmax(-1) == batch['label'], batch)
    return value, ({'loss': value, 'accuracy': accuracy}, model_state)

  return loss
