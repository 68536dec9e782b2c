"""The optimisers of the two players of a run."""

from __future__ import annotations

from typing import Any

from ...train.errors import ConfigError
from ...train.optimizers import FIRST_ORDER, OPTIMIZERS

NAMES = ('generator', 'discriminator')
ALLOWED = ('kfac', *FIRST_ORDER)


def config_of(config: Any, player: str) -> Any:
  """Returns the config as one player's optimiser reads it.

  Raises:
    ConfigError: the optimiser does not work with two players.
  """
  resolved = config.copy_and_resolve_references()
  name = config.gan[player] or config.optimizer
  if name not in ALLOWED:
    known = ', '.join(ALLOWED)
    why = (
      'is unknown' if name not in OPTIMIZERS else 'evaluates the loss, or keeps factors, in a way made for one network'
    )
    raise ConfigError(f'config.gan.{player}={name!r} {why}; choose from {known}')
  resolved.optimizer = name
  ratio = config.gan.generator_rate if player == 'generator' else 1.0
  resolved[name].learning_rate = resolved[name].learning_rate * ratio
  if player == 'discriminator':  # its schedule counts the discriminator's steps
    resolved.steps, resolved[name].warmup_steps = (
      n * config.gan.discriminator_steps for n in (resolved.steps, resolved[name].warmup_steps)
    )
  return resolved
