"""The optimisers of two players, where a run has two."""

from __future__ import annotations

from typing import Any

from experiments.errors import ConfigError
from experiments.optimizers import FIRST_ORDER, OPTIMIZERS, SECOND_ORDER, make_optimizer
from kronmesh import kron

NAMES = ('generator', 'discriminator')
ALLOWED = ('kfac', *FIRST_ORDER)


def config_of(config: Any, player: str) -> Any:
  """The config as one player's optimiser reads it.

  Raises:
    ConfigError: an optimiser that does not go with two players.
  """
  own = config.copy_and_resolve_references()
  name = config.gan[player] or config.optimizer
  if name not in ALLOWED:
    known = ', '.join(ALLOWED)
    why = (
      'is unknown' if name not in OPTIMIZERS else 'evaluates the loss, or keeps factors, in a way made for one network'
    )
    raise ConfigError(f'config.gan.{player}={name!r} {why}; choose from {known}')
  own.optimizer = name
  ratio = config.gan.generator_rate if player == 'generator' else 1.0
  own[name].learning_rate = own[name].learning_rate * ratio
  if player == 'discriminator':  # its schedule counts its own steps
    own.steps, own[name].warmup_steps = (
      n * config.gan.discriminator_steps for n in (own.steps, own[name].warmup_steps)
    )
  return own


def make_player(own: Any, curvature: kron.Curvature | None, placement: kron.Placement) -> Any:
  """A player's optimiser, of its `config_of`; K-FAC renews its factors and inverses inside of the step."""
  return make_optimizer(own, curvature, placement, inside=True)


def second_order(own: Any) -> bool:
  return own.optimizer in SECOND_ORDER
