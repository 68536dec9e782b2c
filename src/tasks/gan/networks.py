"""The generator and the discriminator of a config, and their images in a sheet."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ... import models
from ...train.errors import ConfigError

TASK = 'generate'


class Networks(NamedTuple):
  """The networks of both players; their fields are `players.NAMES`."""

  generator: models.Generator
  discriminator: models.Discriminator


def networks(config: Any) -> Networks:
  """Makes the generator and the discriminator of a config.

  Raises:
    ConfigError: the config has settings that they do not have.
  """
  options = config.model.to_dict()
  if options.pop('name') != 'gan':
    raise ConfigError(f"config.task={TASK!r} needs config.model.name='gan'; it is {config.model.name!r}")
  kind = jnp.dtype(options.pop('dtype', 'float32'))
  of_generator = ('size', 'channels', 'classes', 'width', 'latent', 'embedding', 'attention')
  unknown = set(options) - set(of_generator)
  if unknown:
    raise ConfigError(f'config.model of {config.model.name!r} has no {", ".join(sorted(unknown))}')
  both = {k: options[k] for k in ('size', 'classes', 'width', 'attention')}
  # Messages about faults contain their names.
  made = (
    models.Generator(**options, dtype=kind, name='generator'),
    models.Discriminator(**both, dtype=kind, name='discriminator'),
  )
  return Networks(*made)


def grid(images: Float[np.ndarray, 'n h w c'], columns: int) -> Float[np.ndarray, 'H W c']:
  """Arranges images in rows of `columns` images."""
  n, h, w, c = images.shape
  return images.reshape(n // columns, columns, h, w, c).transpose(0, 2, 1, 3, 4).reshape(n // columns * h, -1, c)
