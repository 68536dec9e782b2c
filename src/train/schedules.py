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


def learning_rate(own: Any, config: Any) -> optax.Schedule:
  """Returns a section's schedule: a linear warm-up, then constant, cosine or polynomial; scaled by the batch.

  Raises:
    ConfigError: a name is unknown, or the warm-up is as long as the run.
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
  """Returns the largest learning rate: the rate of the section, scaled by the batch."""
  return own.learning_rate * SCALINGS[config.recipe.rate_scaling](
    config.data.batch_size / config.recipe.reference_batch
  )


def momentum(own: Any, rate: optax.Schedule, peak: float) -> optax.ScalarOrSchedule:
  """Returns the momentum: constant, or with `momentum_follows_rate` in proportion to the learning rate (eq. 19)."""
  if not own.get('momentum_follows_rate'):
    return own.momentum
  return lambda count: own.momentum * rate(count) / peak
