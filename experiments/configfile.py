"""The file behind --config, and what the command line says of it."""

from __future__ import annotations

import runpy
import sys
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


def config_flags_given() -> list[str]:
  """--config and all --config.x of this command, as they were written."""
  found, words = [], iter(sys.argv[1:])
  for word in words:
    name, equals, _ = word.lstrip('-').partition('=')
    if word.startswith('-') and (name == 'config' or name.startswith('config.')):
      found += [word] if equals else [word, next(words, '')]
  return found or [f'--config={config_path()}']
