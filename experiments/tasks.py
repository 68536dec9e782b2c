"""Tasks by name: a model, its loss and the metrics reported with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import graphs, recipe
from experiments.errors import ConfigError
from kronmesh import kron, models

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


def make_task(config: Any, parts: int = 1) -> Task:
  """The config's task.

  parts: into how many a graph is divided, if the model has one.

  Raises:
    ConfigError: an unknown task or model.
  """
  if config.task == 'generate':
    from experiments import adversarial  # which builds upon tasks

    return adversarial.make_task(config)
  if config.task not in TASKS:
    raise ConfigError(f'config.task={config.task!r} is unknown; choose from {", ".join(TASKS)}')
  for name in ('mixup', 'cutmix'):
    if config.recipe[name] and config.task != 'classify':
      raise ConfigError(f"recipe.{name} mixes labels; config.task={config.task!r} has none, only 'classify' has")
  graphs.check(config)
  model = _make_model(config, parts)
  loss, target, lower_is_better, *scores = TASKS[config.task]
  return Task(model, loss(model, config), target, lower_is_better, *scores)


def _make_model(config: Any, parts: int) -> nn.Module:
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
  if name in graphs.MODELS:
    settings |= graphs.settings(config, parts)
  try:
    return classes[name](**settings, dtype=jnp.dtype(kind))
  except TypeError as error:
    raise ConfigError(f'config.model of {name!r}: {str(error).replace("__init__() ", "")}') from error


def _apply(model: nn.Module, params: Any, model_state: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
  variables = {'params': params, **model_state}
  if train and model_state:
    return model.apply(variables, images, train=True, mutable=list(model_state))
  return model.apply(variables, images, train=train), model_state


def _reconstruction(model: nn.Module, config: Any) -> Callable:
  del config

  def loss(params, model_state, batch, train=True):
    pixels = batch['image'].reshape(batch['image'].shape[0], -1)
    logits, model_state = _apply(model, params, model_state, batch['image'], train)
    logits = kron.observe.bernoulli(logits, pixels, mask=recipe.counted(batch))
    value = recipe.mean(optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1), batch)
    error = recipe.mean(((jax.nn.sigmoid(logits) - pixels) ** 2).sum(-1), batch)
    return value, ({'loss': value, 'error': error}, model_state)

  return loss


def _classification(model: nn.Module, config: Any) -> Callable:
  smoothing = config.recipe.label_smoothing

  def loss(params, model_state, batch, train=True):
    logits, model_state = _apply(model, params, model_state, batch['image'], train)
    logits = kron.observe.categorical(logits, batch['label'], mask=recipe.counted(batch))
    if train and (smoothing or 'target' in batch):
      target = recipe.soft_labels(batch, logits.shape[-1], smoothing)
      value = recipe.mean(optax.softmax_cross_entropy(logits, target), batch)
    else:
      value = recipe.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), batch)
    accuracy = recipe.mean(logits.argmax(-1) == batch['label'], batch)
    return value, ({'loss': value, 'accuracy': accuracy}, model_state)

  return loss


def _next_token(model: nn.Module, config: Any) -> Callable:
  """Every token of a window but the first is predicted from those before it; the loss is in nats a token."""
  del config

  def loss(params, model_state, batch, train=True):
    tokens = batch['image']
    logits, model_state = _apply(model, params, model_state, tokens[:, :-1], train)
    mask = None if 'mask' not in batch else jnp.broadcast_to(recipe.counted(batch)[:, None], tokens[:, 1:].shape)
    logits = kron.observe.categorical(logits, tokens[:, 1:], mask=mask)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    value = recipe.mean(each.mean(-1), batch)
    return value, ({'loss': value}, model_state)

  return loss


def _poisson(model: nn.Module, config: Any) -> Callable:
  """A physics-informed network: u = m(x) net(x) with -laplacian(u) = f in the unit square and u = 0 around it.

  m = 16 x (1 - x) y (1 - y) keeps the border exact. 'error' is |u - u*|^2 / |u*|^2 over the points (u* has mean square
  1/4, see `data.poisson_points`).
  """
  del config

  def loss(params, model_state, batch, train=True):
    def u(point):
      x, y = point
      return 16 * x * (1 - x) * y * (1 - y) * _apply(model, params, model_state, point[None], train)[0][0, 0]

    def second(point, along):
      slope = lambda p: jax.jvp(u, (p,), (along,))[1]  # noqa: E731
      return jax.jvp(slope, (point,), (along,))[1]

    def laplacian(point):
      return second(point, jnp.array([1.0, 0.0])) + second(point, jnp.array([0.0, 1.0]))

    points = batch['image']
    # The right side is 5 pi^2 times the solution; divided by that, residuals are of the solution's own size.
    scale = 5 * jnp.pi**2
    residual = jax.vmap(laplacian)(points) / scale + batch['label']
    residual = kron.observe.gaussian(residual[:, None], mask=recipe.counted(batch))
    value = recipe.mean(0.5 * residual[:, 0] ** 2, batch)
    error = recipe.mean((jax.vmap(u)(points) - batch['label']) ** 2, batch) * 4
    return value, ({'loss': value, 'error': error}, model_state)

  return loss


# loss, the metric that the task is about, whether less of it is better, and what becomes of an evaluation's means
TASKS = {
  'reconstruct': (_reconstruction, 'error', True),
  'classify': (_classification, 'accuracy', False),
  'next_token': (_next_token, 'loss', True),
  'poisson': (_poisson, 'error', True),
  'directed': (graphs.directed, 'accuracy', False, graphs.directed_scores),
  'links': (graphs.links, 'mrr', False),
  'generate': (None, 'agreement', False),
  'zero_shot': (graphs.zero_shot, 'zero_shot', False, graphs.zero_shot_scores),
}
