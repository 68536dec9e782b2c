"""The definition of a task: a model, its loss, and the metric by which it is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import models
from .errors import ConfigError

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


class Task(NamedTuple):
  """A model with its loss and its target metric.

  loss: (params, model_state, batch, train) -> (loss, (metrics, new model state)).
  target: the metric by which the task is judged. lower_is_better: whether smaller values of it are better.
  scores: computes the scores from the metrics' means over an evaluation set, for tasks where the two differ.
  game: (data, mesh) -> the `players.Game`, for tasks that train several networks together.
  """

  model: nn.Module
  loss: Callable
  target: str
  lower_is_better: bool
  scores: Callable[[dict[str, float]], dict[str, float]] = dict
  game: Callable | None = None


def first_at(target: float, task: Task, rows: list[dict[str, float]]) -> dict[str, float] | None:
  """Returns the first evaluation at which the task's metric reached the target, or None."""
  key, sign = f'eval_{task.target}', 1 if task.lower_is_better else -1
  return next((row for row in rows if sign * row[key] <= sign * target), None)


def make_model(config: Any, **more: Any) -> nn.Module:
  """Makes the network that `config.model` describes.

  more: settings that `config.model` does not contain, such as a graph.

  Raises:
    ConfigError: a name, type or setting is unknown.
  """
  settings = config.model.to_dict()
  name = settings.pop('name')
  classes = {
    'autoencoder': models.Autoencoder,
    'convnet': models.ConvNet,
    'directed_video': models.DirectedVideo,
    'link_predictor': models.LinkPredictor,
    'mlp': models.MLP,
    'r2plus1d': models.R2Plus1D,
    'resnet': models.ResNet,
    'ternary': models.TernaryNet,
    'transformer': models.Transformer,
    'video_transformer': models.VideoTransformer,
    'vit': models.ViT,
    'zero_shot': models.ZeroShot,
  }
  if name not in classes:
    raise ConfigError(f'config.model.name={name!r} is unknown; choose from {", ".join(classes)}')
  kind = settings.pop('dtype', 'float32')
  if kind not in DTYPES:
    raise ConfigError(f'config.model.dtype={kind!r} is unknown; choose from {", ".join(DTYPES)}')
  try:
    return classes[name](**settings, **more, dtype=jnp.dtype(kind))
  except TypeError as error:
    raise ConfigError(f'config.model of {name!r}: {str(error).replace("__init__() ", "")}') from error


def apply(model: nn.Module, params: Any, model_state: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
  variables = {'params': params, **model_state}
  if train and model_state:
    return model.apply(variables, images, train=True, mutable=list(model_state))
  return model.apply(variables, images, train=train), model_state
