"""The config file that --config names, by its path or by the name of a packaged config, and its preset."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import runpy
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from .defaults import defaults

CONFIGS = 'kronmesh.configs'  # the package that holds the configs that are found by name


def packaged() -> dict[str, Path]:
  """Returns the packaged config files by name."""
  spec = importlib.util.find_spec(CONFIGS)
  folders = list(spec.submodule_search_locations or ()) if spec else []
  return {path.stem: path for folder in folders for path in sorted(Path(folder).glob('[a-z]*.py'))}


def resolve(value: str) -> str:
  """Returns the path, with the preset, for the value of --config: 'digits', 'noise:vit_b', or a path, which stays."""
  name, colon, preset = value.partition(':')
  path = packaged().get(name) if name.isidentifier() and not Path(name).exists() else None
  return f'{path}{colon}{preset}' if path else value


def short_name(value: str) -> str:
  """Returns the name of a packaged config, with the preset, for its path, and any other path as it is."""
  file, dot, preset = value.partition('.py')
  path = packaged().get(Path(file).name)
  return f'{path.stem}{preset}' if dot and path and path == Path(f'{file}.py').absolute() else value


def unknown(value: str) -> str:
  """Says in one line that --config names no file, with the nearest packaged name."""
  name = Path(value.partition('.py')[0].partition(':')[0]).name
  near = difflib.get_close_matches(name, packaged(), 1)
  hint = f'did you mean --config={near[0]}? ' if near else ''
  return f'no config file {value!r}; {hint}kronmesh configs lists all'


def summary(path: Path) -> str:
  """Returns the first line of a config file's docstring, without running the file."""
  return (ast.get_docstring(ast.parse(path.read_text())) or '').partition('\n')[0]


def known_keys() -> list[str]:
  """Returns the paths of the settings that all configs have, such as 'kfac.damping'."""
  paths = lambda section, prefix: [  # noqa: E731
    path
    for key, value in section.items()
    for path in (paths(value, f'{prefix}{key}.') if isinstance(value, ConfigDict) else [f'{prefix}{key}'])
  ]
  return paths(defaults(), '')


def config_path() -> str:
  """Returns the path in --config, perhaps with a preset after a colon."""
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
