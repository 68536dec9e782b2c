"""Learning rates and momentums over the steps of a run.

Those for large batches come from SP-NGD (Osawa et al. 2020, arXiv:2002.06015, section 5).
"""

from __future__ import annotations

import math
from typing import Any

import optax

from .errors import ConfigError

SCALINGS = {'none': lambda ratio: 1.0, 'linear': lambda ratio: ratio, 'sqrt': math.sqrt}
SCHEDULES = ('constant', 'cosine', 'polynomial')


def learning_rate(settings: Any, config: Any) -> optax.Schedule:
  """Returns a section's schedule: a linear warm-up, then constant, cosine or polynomial; scaled by the batch.

  Raises:
    ConfigError: a name is unknown, or the warm-up is as long as the run.
  """
  if settings.warmup_steps >= config.steps:
    raise ConfigError(f'{config.optimizer}.warmup_steps={settings.warmup_steps} leaves nothing of steps={config.steps}')
  if config.recipe.rate_scaling not in SCALINGS:
    raise ConfigError(
      f'recipe.rate_scaling={config.recipe.rate_scaling!r} is unknown; choose from {", ".join(SCALINGS)}'
    )
  peak_rate = peak(settings, config)
  left = config.steps - settings.warmup_steps
  if settings.schedule == 'constant':
    after = optax.constant_schedule(peak_rate)
  elif settings.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak_rate, left, alpha=0.01)
  elif settings.schedule == 'polynomial':
    after = optax.polynomial_schedule(peak_rate, 0.01 * peak_rate, settings.power, left)
  else:
    raise ConfigError(
      f'{config.optimizer}.schedule={settings.schedule!r} is unknown; choose from {", ".join(SCHEDULES)}'
    )
  if not settings.warmup_steps:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak_rate, settings.warmup_steps), after], [settings.warmup_steps]
  )


def peak(settings: Any, config: Any) -> float:
  """Returns the largest learning rate: the rate of the section, scaled by the batch."""
  return settings.learning_rate * SCALINGS[config.recipe.rate_scaling](
    config.data.batch_size / config.recipe.reference_batch
  )


def momentum(settings: Any, rate: optax.Schedule, peak_rate: float) -> optax.ScalarOrSchedule:
  """Returns the momentum: constant, or with `momentum_follows_rate` in proportion to the learning rate (eq. 19)."""
  if not settings.get('momentum_follows_rate'):
    return settings.momentum
  return lambda count: settings.momentum * rate(count) / peak_rate
