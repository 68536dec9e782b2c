"""Optimisers with settings as one word of a command line, such as kfac:inverses_every=10:steps=150."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import ConfigError
from ..optimizers import OPTIMIZERS, PEERS
from ..settings.overrides import resolved


def member(config: Any, name: str) -> tuple[Any, dict[str, Any]]:
  """Returns the config that OPTIMISER:key=value:... describes, and the values that it sets.

  A key is looked up in the optimiser's section first, and then in the config.

  Raises:
    ConfigError: the optimiser or a key is unknown, or a value has another type than the config's.
  """
  optimizer, *settings = name.split(':')
  if optimizer not in (*OPTIMIZERS, *PEERS):
    raise ConfigError(f'--optimizers: {optimizer!r} is unknown; choose from {", ".join((*OPTIMIZERS, *PEERS))}')
  variant_config, given = copy.deepcopy(config), {}
  variant_config.optimizer = optimizer
  if optimizer in PEERS:
    variant_config.keep_checkpoints = variant_config.keep_best = 0  # checkpoints hold only our optimisers' states
  for setting in settings:
    key, _, value = setting.partition('=')
    try:
      given |= resolved({f'optimizer.{key}' if key in variant_config[optimizer] else key: value}, variant_config)
    except ConfigError as error:
      raise ConfigError(f'--optimizers: {setting!r} of {name!r} does not fit the config; {error}') from error
  variant_config.update_from_flattened_dict(given)
  return variant_config, given
