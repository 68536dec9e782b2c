"""Optimisers by name, built from the config's section of that name."""

from __future__ import annotations

from typing import Any

import optax

from experiments.errors import ConfigError
from kronmesh import kron
from kronmesh.parallel import Placement

OPTIMIZERS = ('kfac', 'sgd', 'adam', 'muon')


def make_optimizer(config: Any, curvature: kron.Curvature | None, placement: Placement) -> optax.GradientTransformation:
  """The optimiser `config.optimizer`; `curvature` is needed by K-FAC only.

  Raises:
    ConfigError: an unknown name, or a schedule that is unknown or longer than the run.
  """
  if config.optimizer not in OPTIMIZERS:
    raise ConfigError(f'config.optimizer={config.optimizer!r} is unknown; choose from {", ".join(OPTIMIZERS)}')
  own = config[config.optimizer]
  rate = _schedule(own, config)
  if config.optimizer == 'sgd':
    return optax.chain(optax.add_decayed_weights(own.weight_decay), optax.sgd(rate, momentum=own.momentum))
  if config.optimizer == 'adam':
    return optax.adamw(rate, b1=own.b1, b2=own.b2, weight_decay=own.weight_decay)
  if config.optimizer == 'muon':
    return optax.contrib.muon(rate, beta=own.momentum, weight_decay=own.weight_decay)
  # Without intervals: the loop says at each step what is due, see `train.phase`.
  return kron.kfac(
    rate,
    curvature,
    damping=own.damping,
    momentum=own.momentum,
    kl_clip=own.kl_clip or None,
    weight_decay=own.weight_decay,
    decay=own.decay,
    placement=placement,
  )


def _schedule(own: Any, config: Any) -> optax.Schedule:
  if own.warmup_steps >= config.steps:
    raise ConfigError(f'{config.optimizer}.warmup_steps={own.warmup_steps} leaves nothing of steps={config.steps}')
  if own.schedule == 'constant':
    after = optax.constant_schedule(own.learning_rate)
  elif own.schedule == 'cosine':
    after = optax.cosine_decay_schedule(own.learning_rate, config.steps - own.warmup_steps, alpha=0.01)
  else:
    raise ConfigError(f"{config.optimizer}.schedule={own.schedule!r} is unknown; choose 'constant' or 'cosine'")
  if not own.warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, own.learning_rate, own.warmup_steps)
  return optax.join_schedules([warmup, after], [own.warmup_steps])
