"""The config file that --config names, and its preset."""

from __future__ import annotations

import runpy
from typing import Any

from absl import flags
from ml_collections import config_flags


def config_path() -> str:
  """Returns the value of --config as given, perhaps with a preset after a colon."""
  return config_flags.get_config_filename(flags.FLAGS['config'])


def config_functions() -> dict[str, Any]:
  """Returns the names that the config file defines, with their values."""
  file, _, _ = config_path().partition('.py:')
  return runpy.run_path(file.removesuffix('.py') + '.py')


def fresh_config() -> Any:
  """Returns the config that the file makes with its preset, before any --config.x changes it."""
  _, _, preset = config_path().partition('.py:')
  make = config_functions()['get_config']
  return make(preset) if preset else make()
