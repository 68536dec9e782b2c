"""Tasks by name, as modules of `tasks`: each is loaded when a config names it, so the trainer imports none."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from .errors import ConfigError
from .task import Task


class Entry(NamedTuple):
  """A task in the registry.

  module: the module of `tasks` that defines `make_task`. target, lower_is_better: as in `Task`.
  model: the model that belongs to this task alone, if there is one.
  """

  module: str
  target: str
  lower_is_better: bool
  model: str | None = None


TASKS = {
  'reconstruct': Entry('basic', 'error', True),
  'classify': Entry('basic', 'accuracy', False),
  'next_token': Entry('basic', 'loss', True),
  'poisson': Entry('basic', 'error', True),
  'directed': Entry('graphs', 'accuracy', False, 'directed_video'),
  'links': Entry('graphs', 'mrr', False, 'link_predictor'),
  'generate': Entry('gan.adversarial', 'agreement', False, 'gan'),
  'zero_shot': Entry('graphs', 'zero_shot', False, 'zero_shot'),
}


def load(module: str) -> ModuleType:
  """Imports a module of `tasks` by its name."""
  return importlib.import_module(f'..tasks.{module}', __package__)


def make_task(config: Any, parts: int = 1) -> Task:
  """Makes the task that the config names.

  parts: the number of parts into which a graph is divided, if the model has one.

  Raises:
    ConfigError: the task or the model is unknown, or the two do not belong together.
  """
  entry = TASKS.get(config.task)
  if entry is None:
    raise ConfigError(f'config.task={config.task!r} is unknown; choose from {", ".join(TASKS)}')
  if config.recipe.teacher and config.task != 'classify':
    raise ConfigError(
      f"recipe.teacher has logits of classes; config.task={config.task!r} has none, only 'classify' has"
    )
  for name in ('mixup', 'cutmix'):
    if config.recipe[name] and config.task != 'classify':
      raise ConfigError(f"recipe.{name} mixes labels; config.task={config.task!r} has none, only 'classify' has")
  for task, model in ((name, e.model) for name, e in TASKS.items() if e.model):
    if (config.task == task) != (config.model.name == model):
      raise ConfigError(
        f'config.task={config.task!r} does not work with config.model.name={config.model.name!r}: '
        f'{task!r} and {model!r} belong together'
      )
  return load(entry.module).make_task(config, parts)
