"""Checks of a config's keys, types and ranges, made before anything is built."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from ml_collections import ConfigDict

from ... import models
from ..errors import ConfigError
from .defaults import defaults

# Ranges by path, or by name for the sections of optimisers: '>= 0', '> 0', '[0, 1)', '(0, 1]'. Numbers must be finite.
RANGES = {
  'seed': '>= 0',
  'steps': '>= 1',
  'eval_every': '>= 1',
  'log_every': '>= 1',
  'microbatches': '>= 1',
  'health_every': '>= 0',
  'checkpoint_every': '>= 0',
  'checkpoint_minutes': '>= 0',
  'keep_checkpoints': '>= 0',
  'keep_best': '>= 0',
  'devices': '>= 0',
  'watchdog_seconds': '>= 0',
  'data.graph_seed': '>= 0',
  'data.batch_size': '>= 1',
  'data.eval_batch_size': '>= 0',
  'data.eval_examples': '>= 0',
  'data.image_size': '>= 1',
  'data.image_width': '>= 0',
  'data.bands': '>= 1',
  'data.frames': '>= 0',
  'data.every': '>= 1',
  'data.rate': '> 0',
  'data.short_side': '>= 1',
  'data.colour': '[0, 1)',
  'gradients.bucket_mb': '> 0',
  'faults.deviations': '> 0',
  'faults.limit': '>= 1',
  'faults.damping_factor': '> 1',
  'gan.discriminator_steps': '>= 1',
  'gan.r1': '>= 0',
  'gan.generator_rate': '> 0',
  'recipe.reference_batch': '>= 1',
  'recipe.label_smoothing': '[0, 1)',
  'recipe.mixup': '>= 0',
  'recipe.cutmix': '>= 0',
  'recipe.clip_norm': '>= 0',
  'recipe.average': '[0, 1)',
  'recipe.teacher_share': '(0, 1]',
  'recipe.teacher_temperature': '> 0',
  'recipe.loss_scale': '>= 0',
  'learning_rate': '> 0',
  'power': '> 0',
  'warmup_steps': '>= 0',
  'weight_decay': '>= 0',
  'momentum': '[0, 1)',
  'b1': '[0, 1)',
  'b2': '[0, 1)',
  'decay': '[0, 1)',
  'subsample': '(0, 1]',
  'damping': '> 0',
  'kl_clip': '>= 0',
  'statistics_every': '>= 1',
  'burn_in_steps': '>= 0',
  'inverses_every': '>= 1',
  'threshold': '> 0',
  'smallest': '>= 1',
  'largest': '>= 1',
  'damping_every': '>= 1',
  'damping_rate': '(0, 1]',
  'smallest_damping': '> 0',
  'max_iterations': '>= 1',
  'tolerance': '> 0',
}


_FOLDERS = (
  'data.folder',
  'data.source',
  'data.graph_source',
  'generated.run',
  'generated.judge',
  'gan.judge',
  'recipe.teacher',
  'start',
)
# The largest value of a task's metric, where there is one.
_MOST = {'classify': 1.0, 'directed': 1.0, 'links': 1.0, 'generate': 1.0, 'zero_shot': 1.0}


def check_plain(config: Any, above: str = 'config') -> None:
  """Raises ConfigError unless all values are numbers, text, tuples of these or None, which JSON can hold."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      check_plain(value, f'{above}.{name}')
      continue
    odd = next((x for x in (value if isinstance(value, tuple | list) else [value]) if not _is_plain(x)), None)
    if odd is not None:
      remedy = f'write .item() behind it, or {odd.item()!r}' if hasattr(odd, 'item') else 'write it as text or a number'
      raise ConfigError(f'{above}.{name}={value!r} is of the type {type(odd).__name__}; {remedy}')


def _is_plain(value: Any) -> bool:
  if isinstance(value, tuple | list):
    return all(map(_is_plain, value))
  return value is None or type(value) in (bool, int, float, str)


def check_whole(config: Any) -> None:
  """Raises ConfigError unless the config has exactly the default keys, with a section for each default section."""
  check_plain(config)
  _check_known(config, defaults())
  for name, default in defaults().items():
    if name not in config:
      raise ConfigError(f'the config has no key {name!r}; start from defaults() of src/train/settings/defaults.py')
    if isinstance(default, ConfigDict) != isinstance(config[name], ConfigDict):
      kind = 'a section' if isinstance(default, ConfigDict) else f'a {type(default).__name__}'
      raise ConfigError(f'config.{name}={config[name]!r} must be {kind}')
    lacks = [key for key in default if key not in config[name]] if isinstance(default, ConfigDict) else []
    if lacks and name != 'model':
      raise ConfigError(f'the config has no key {name}.{lacks[0]}; update the section of defaults(), do not replace it')
  for path in _FOLDERS:
    *section, key = path.split('.')
    value = str((config[section[0]] if section else config)[key])
    if value.startswith('~'):
      raise ConfigError(f'config.{path}={value!r}: write the whole path; ~ is expanded by shells alone')
  if 'name' not in config.model:
    raise ConfigError('the config has no key model.name')


def _check_known(config: Any, known: Any, above: str = 'config') -> None:
  """Raises ConfigError for an unknown key, because a misspelt key in a file makes a new option that nothing reads."""
  for name, value in config.items():
    if name not in known:
      near = difflib.get_close_matches(name, list(known), 1)
      hint = f'; did you mean {near[0]!r}?' if near else '; see defaults() of src/train/settings/defaults.py'
      raise ConfigError(f'{above}.{name} is not an option{hint}')
    if isinstance(value, ConfigDict) and isinstance(known[name], ConfigDict) and name != 'model':
      _check_known(value, known[name], f'{above}.{name}')


def check_ranges(config: Any) -> None:
  """Checks all numbers except those of unused optimisers.

  Raises:
    ConfigError: a number is outside its range or not finite.
  """
  if any(not isinstance(n, int) or n < 1 for n in config.data.shape):
    raise ConfigError(f'config.data.shape={config.data.shape!r} must be a tuple of whole numbers of at least 1')
  if any(not isinstance(n, int) or n < 0 for n in config.data.held_out):
    raise ConfigError(f'config.data.held_out={config.data.held_out!r} must be a tuple of whole numbers of at least 0')
  if config.target > _MOST.get(config.task, math.inf):
    raise ConfigError(f'config.target={config.target:g} is never reached: the metric of {config.task!r} is at most 1')
  unknown = [name for name in config.gan.augment if name not in models.POLICIES]
  if unknown:
    raise ConfigError(f'config.gan.augment has {unknown[0]!r}; choose from {", ".join(models.POLICIES)}')
  sections = (
    '',
    'data',
    'gradients',
    'faults',
    'gan',
    'generated',
    'recipe',
    'placement',
    'model',
    config.optimizer,
  )  # an unknown optimiser has no section
  for section in sections:
    settings = config.get(section, {}) if section else config
    for name, value in settings.items():
      if isinstance(value, ConfigDict | bool) or not isinstance(value, int | float):
        continue
      path = f'{section}.{name}' if section else name
      rule = RANGES.get(name if section == config.optimizer else path)
      if isinstance(value, int) and abs(value) >= 2**31:
        raise ConfigError(f'config.{path}={value} must be in (-2147483648, 2147483648)')
      if not math.isfinite(value):
        raise ConfigError(f'config.{path}={value} must be a finite number')
      if rule is not None and not _fits(value, rule):
        shown = f'{value:g}' if isinstance(value, float) else value
        raise ConfigError(f'config.{path}={shown} must be {_words(rule)}')


def _fits(value: float, rule: str) -> bool:
  interval = re.fullmatch(r'([\[(])(.+), (.+)([\])])', rule)
  if interval is None:
    sign, bound = rule.split()
    return value > float(bound) if sign == '>' else value >= float(bound)
  low, high = float(interval[2]), float(interval[3])
  above = value >= low if interval[1] == '[' else value > low
  return above and (value <= high if interval[4] == ']' else value < high)


def _words(rule: str) -> str:
  if rule[0] in '[(':
    return f'in {rule}'
  sign, bound = rule.split()
  return f'{"greater than" if sign == ">" else "at least"} {bound}'
