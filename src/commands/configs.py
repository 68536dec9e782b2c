"""Lists the packaged configs with their first lines, or tells all of one: its description, presets and settings.

kronmesh configs
kronmesh configs digits
kronmesh configs resolution:8k
"""

from __future__ import annotations

import runpy
import sys

from ml_collections import ConfigDict

from ..train.errors import MISTAKE
from ..train.settings import configfile


def listing() -> str:
  """Returns one line for each packaged config."""
  configs = {name: configfile.summary(path) for name, path in configfile.packaged().items()}
  width = max(map(len, configs))
  lines = [f'{name:{width}}  {words}' for name, words in configs.items()]
  return '\n'.join([*lines, '', 'kronmesh configs NAME tells more; kronmesh train --config=NAME trains one.'])


def described(value: str) -> str:
  """Returns the description of a config and its settings, as they can be given on a command line.

  Raises:
    ValueError: there is no such config or preset.
  """
  path, _, preset = configfile.resolve(value).partition('.py')
  if not path or path == value:
    raise ValueError(configfile.unknown(value))
  names = runpy.run_path(f'{path}.py')
  config = names['get_config'](preset[1:]) if preset else names['get_config']()
  sections = [key for key, section in config.items() if isinstance(section, ConfigDict) and 'learning_rate' in section]
  others = [name for name in sections if name != config.optimizer]
  lines = [f'--config.{key}={shown}' for key, shown in _settings(config, '') if key.partition('.')[0] not in others]
  more = f'Other optimisers have sections of their own: {", ".join(others)}.'
  return '\n'.join([names['__doc__'].strip(), '', f'Settings of {value}, with their values:', '', *lines, '', more])


def _settings(config: ConfigDict, prefix: str) -> list[tuple[str, str]]:
  rows = []
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      rows += _settings(value, f'{prefix}{key}.')
    else:
      rows.append((f'{prefix}{key}', f"'{value}'" if isinstance(value, (str, tuple)) else f'{value}'))
  return rows


def command() -> None:
  """Prints the list, or the config that the command line names."""
  words = [word.removeprefix('--config=') for word in sys.argv[1:]]
  if words and words[0] in ('--help', '-h', '--helpfull'):
    print(__doc__.strip())
    return
  try:
    print(described(words[0]) if words else listing())
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(MISTAKE)
