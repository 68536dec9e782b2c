"""An optimiser with settings, as one word of a command line: kfac:inverses_every=10:steps=150."""

from __future__ import annotations

import copy
from typing import Any

from experiments.errors import ConfigError
from experiments.optimizers import OPTIMIZERS, PEERS
from experiments.overrides import resolved


def member(config: Any, name: str) -> tuple[Any, dict[str, Any]]:
  """The config of OPTIMISER:key=value:..., and these values; a key is of the optimiser's own section, else of the config.

  Raises:
    ConfigError: an unknown optimiser or key, or a value of another type than the config's.
  """
  optimizer, *settings = name.split(':')
  if optimizer not in (*OPTIMIZERS, *PEERS):
    raise ConfigError(f'--optimizers: {optimizer!r} is unknown; choose from {", ".join((*OPTIMIZERS, *PEERS))}')
  own, given = copy.deepcopy(config), {}
  own.optimizer = optimizer
  if optimizer in PEERS:
    own.keep_checkpoints = own.keep_best = 0  # which hold our own optimisers' states alone
  for setting in settings:
    key, _, value = setting.partition('=')
    try:
      given |= resolved({f'optimizer.{key}' if key in own[optimizer] else key: value}, own)
    except ConfigError as error:
      raise ConfigError(f'--optimizers: {setting!r} of {name!r} does not fit the config; {error}') from error
  own.update_from_flattened_dict(given)
  return own, given
