"""The file behind --config, and what the command line says of it."""

from __future__ import annotations

import runpy
from typing import Any

from absl import flags
from ml_collections import config_flags


def config_path() -> str:
  """As it was given; a preset may stand behind a colon."""
  return config_flags.get_config_filename(flags.FLAGS['config'])


def config_functions() -> dict[str, Any]:
  """What the file defines."""
  file, _, _ = config_path().partition('.py:')
  return runpy.run_path(file.removesuffix('.py') + '.py')


def fresh_config() -> Any:
  """The config as the file makes it, with its preset, before any --config.x."""
  _, _, preset = config_path().partition('.py:')
  make = config_functions()['get_config']
  return make(preset) if preset else make()
