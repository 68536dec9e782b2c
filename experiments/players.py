"""Two players' curvatures and optimisers, where a run has two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.errors import ConfigError
from experiments.optimizers import FIRST_ORDER, OPTIMIZERS, SECOND_ORDER, make_optimizer
from kronmesh import kron

NAMES = ('generator', 'discriminator')
ALLOWED = ('kfac', *FIRST_ORDER)


class Players(NamedTuple):
  """The curvature of each player; None for one with an optimiser of first order."""

  generator: kron.Curvature | None
  discriminator: kron.Curvature | None

  def __str__(self) -> str:
    return '\n\n'.join(f'{name}\n\n{own}' for name, own in self._asdict().items() if own is not None)


def of_each(fn: Callable, curvature: Players | kron.Curvature, opt_state: Any, *rest: Any) -> Any:
  """`fn` of (a state, its curvature, ...), of every player's, or of the only one's."""
  if not isinstance(curvature, Players):
    return fn(opt_state, curvature, *rest)
  found = dict(opt_state)
  for name, own in curvature._asdict().items():
    if own is not None:
      found[name] = fn(opt_state[name], own, *(r[name] if isinstance(r, dict) else r for r in rest))
  return found


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
