"""What a task is: a model, its loss, and the metric that it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.errors import ConfigError
from kronmesh import models

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


class Task(NamedTuple):
  """`loss(params, model_state, batch, train)` -> (loss, (metrics, new model state)).

  target: the metric that the task is about, and whether less of it is better.
  scores: of the means of metrics over an evaluation set, where they are not those.
  """

  model: nn.Module
  loss: Callable
  target: str
  lower_is_better: bool
  scores: Callable[[dict[str, float]], dict[str, float]] = dict


def first_at(target: float, task: Task, rows: list[dict[str, float]]) -> dict[str, float] | None:
  """The first evaluation at which the task's metric reached the target."""
  key, sign = f'eval_{task.target}', 1 if task.lower_is_better else -1
  return next((row for row in rows if sign * row[key] <= sign * target), None)


def make_model(config: Any, **more: Any) -> nn.Module:
  """Makes the network that `config.model` describes.

  more: settings that do not stand there, such as a graph.

  Raises:
    ConfigError: an unknown name, type or setting.
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
