"""The settings of a run that matter, and where and with which code it was trained."""

from __future__ import annotations

import re
from typing import Any

from ..runtime.workdir import as_json, flat
from ..settings.defaults import defaults

_FIRST = ('learning_rate', 'damping')  # always shown, also where they are the defaults
_SHOWN = ('optimizer', 'model', 'data.name', 'data.batch_size', 'mesh', 'devices', 'seed', 'steps', 'task')
_LONGEST = 160  # characters of a value
_MOST = 12  # other settings
_COMMIT = re.compile(r'^([0-9a-f]{12})[0-9a-f]{28,52}(?= |$)')  # twelve digits identify it
_ORIGIN = (
  ('git_commit', 'git commit'),
  ('kronmesh', 'kronmesh'),
  ('python', 'Python'),
  ('jax', 'JAX'),
  ('host', 'host'),
  ('devices', 'devices'),
  ('started', 'started'),
  ('started_in', 'in'),
)


def settings(config: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns the settings that matter of a run's config, as names and words."""
  usual, name = as_json(defaults()), config['optimizer']
  model = {k: v for k, v in config['model'].items() if k != 'name'}
  shown = [
    ('optimizer', _named(name, _changed(config.get(name), usual.get(name), _FIRST))),
    ('model', _named(config['model']['name'], model)),
    ('data', str(config['data']['name'])),
    ('batch', f'{config["data"]["batch_size"]}'),
    ('mesh', config['mesh']),
    ('seed', f'{config["seed"]}'),
    ('steps', f'{config["steps"]:,}'),
  ]
  others = _others(config, usual)
  return [*shown, *([('other settings', _words(others))] if others else [])]


def _others(config: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
  """Returns the other settings that are not the defaults, without the sections of other optimisers."""
  own = [key for key, value in usual.items() if isinstance(value, dict) and 'learning_rate' in value]
  skipped = (*_SHOWN, *own)
  here, there = flat(config), flat(usual)
  is_other = lambda key: not any(key == name or key.startswith(f'{name}.') for name in skipped)  # noqa: E731
  changed = {k: v for k, v in here.items() if is_other(k) and k in there and v != there[k]}
  return dict(list(changed.items())[:_MOST])


def _changed(section: Any, usual: Any, first: tuple[str, ...]) -> dict[str, Any]:
  """Returns the values of a section that come first or are not the defaults."""
  if not isinstance(section, dict):
    return {}
  usual = usual if isinstance(usual, dict) else {}
  chosen = {k: section[k] for k in first if k in section}
  return chosen | {k: v for k, v in section.items() if k not in usual or v != usual[k]}


def _named(name: Any, values: dict[str, Any]) -> str:
  words = _words(values)
  return f'{name}: {words}' if words else f'{name}'


def _words(values: dict[str, Any]) -> str:
  return ', '.join(f'{key} {_word(value)}' for key, value in values.items())


def _word(value: Any) -> str:
  words = f'({", ".join(map(str, value))})' if isinstance(value, list) else "''" if value == '' else str(value)
  return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + '...'


def origin(about: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns where and with which code a run was trained, as names and words, from its `about.json`."""
  found = [(words, str(about[key])) for key, words in _ORIGIN if about.get(key) not in ('', None)]
  return [(words, _COMMIT.sub(r'\1', value)) for words, value in found]
