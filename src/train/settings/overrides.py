"""Settings of a config as text: 'optimizer.damping=1e-3,1e-2;seed=0..4' stands for ten overrides."""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from .. import jsonfile
from ..errors import ConfigError

Overrides = dict[str, Any]
_MOST = 10_000  # members of a sweep
_LONGEST = 150  # characters of a member's name; file systems allow 255 bytes, with endings


def parse_sweep(text: str, config: Any) -> list[Overrides]:
  """Returns the overrides for all combinations of the values of each key.

  Args:
    text: key=value,value,...;key=first..last;... A key 'optimizer.x' means x in the section of the optimiser.
    config: the config whose keys and types the overrides must match.

  Raises:
    ConfigError: a key is unknown, a value has another type, or the text is no such list.
  """
  axes: dict[str, list[str]] = {}
  for part in filter(None, (p.strip() for p in text.split(';'))):
    key, equals, values = part.partition('=')
    if not equals or not values.strip():
      raise ConfigError(f'--sweep: {part!r} is not key=value,value; keys are separated by ;')
    if key.strip() in axes:
      raise ConfigError(f'--sweep: {key.strip()!r} is given twice')
    axes[key.strip()] = _values(values)
  if not axes:
    raise ConfigError('--sweep is empty; write --sweep=seed=0..4')
  count = math.prod(len(values) for values in axes.values())
  if count > _MOST:
    raise ConfigError(f'--sweep has {count} combinations, more than {_MOST}')
  return [
    resolved(dict(zip(axes, combination, strict=True)), config) for combination in itertools.product(*axes.values())
  ]


def _values(text: str) -> list[str]:
  """Splits a text at the commas outside brackets, and expands first..last into whole numbers."""
  if any(text.count(a) != text.count(b) for a, b in ('()', '[]')):
    raise ConfigError(f'--sweep: a bracket of {text!r} is open')
  values = [v.strip() for v in re.split(r',(?![^(\[]*[)\]])', text)]
  if '' in values:
    raise ConfigError(f'--sweep: {text!r} has an empty value; take a comma away')
  result: list[str] = []
  for value in values:
    ends = re.fullmatch(r'(-?\d+)\.\.(-?\d+)', value)
    if ends is None:
      result.append(value)
    elif int(ends[2]) < int(ends[1]):
      raise ConfigError(f'--sweep: {value!r} counts backwards')
    elif int(ends[2]) - int(ends[1]) >= _MOST:
      raise ConfigError(f'--sweep: {value!r} counts more than {_MOST} values')
    else:
      result += map(str, range(int(ends[1]), int(ends[2]) + 1))
  return result


def resolved(overrides: Overrides, config: Any) -> Overrides:
  """Returns the overrides with full keys, and with values of the config's types.

  Raises:
    ConfigError: a key is unknown, or a value has another type.
  """
  optimizer = str(overrides.get('optimizer', config.optimizer))
  result: Overrides = {}
  for key, value in overrides.items():
    path = re.sub(r'^optimizer\.', f'{optimizer}.', key)
    result[path] = _of_type(path, value, _get(config, path))
  return result


def _get(config: Any, path: str) -> Any:
  section, parts = config, path.split('.')
  for i, part in enumerate(parts):
    if not isinstance(section, ConfigDict) or part not in section:
      known = list(section) if isinstance(section, ConfigDict) else []
      near = difflib.get_close_matches(part, known, 1)
      hint = f'; did you mean {".".join([*parts[:i], *near])!r}?' if near else ''
      raise ConfigError(f'the config has no key {path!r}{hint}')
    section = section[part]
  if isinstance(section, ConfigDict):
    raise ConfigError(f'{path!r} is a section of the config, not a value; it has {", ".join(section)}')
  return section


def _of_type(path: str, value: Any, old: Any) -> Any:
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, str) and not isinstance(old, str):
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      raise ConfigError(f'{path}={value}: the config has {old!r} there, a {type(old).__name__}') from None
  if isinstance(old, float) and type(value) is int:
    value = float(value)
  if isinstance(old, tuple) and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,)
  if type(value) is not type(old):
    raise ConfigError(f'{path}={value!r}: the config has {old!r} there, a {type(old).__name__}')
  return value


def apply(config: Any, overrides: Overrides) -> Any:
  """Returns a copy of the config with the overrides applied."""
  resolved_config = config.copy_and_resolve_references()
  resolved_config.update_from_flattened_dict(overrides)
  return resolved_config


def differences(config: Any, fresh: Any) -> Overrides:
  """Returns the values of a config that differ from those of another config with the same keys."""
  changed: Overrides = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      changed |= {f'{key}.{k}': v for k, v in differences(value, fresh[key]).items()}
    elif key not in fresh or value != fresh[key] or type(value) is not type(fresh[key]):
      changed[key] = value
  return changed


def check_different(among: Sequence[Overrides], config: Any) -> None:
  """Raises ConfigError if two members differ only in options of an unused optimiser, and so would train the same."""
  sections = {name for name, value in config.items() if isinstance(value, ConfigDict) and 'learning_rate' in value}
  seen: dict[str, Overrides] = {}
  for combination in among:
    values = jsonfile.loads(apply(config, combination).to_json())
    used = {k: v for k, v in values.items() if k not in sections - _optimizers_of(values)}
    other = seen.setdefault(jsonfile.dumps(used, sort_keys=True), combination)
    if other is not combination:
      key = next(k for k in {**combination, **other} if combination.get(k) != other.get(k))
      raise ConfigError(
        f'--sweep: {key} makes no difference to config.optimizer={values["optimizer"]!r}, whose members would be the same'
      )


def _optimizers_of(values: dict[str, Any]) -> set[str]:
  return {values['optimizer'], values['gan']['generator'], values['gan']['discriminator']}


def flags_of(overrides: Overrides) -> list[str]:
  """Returns the overrides as flags of a command."""
  return [f'--config.{key}={value}' for key, value in overrides.items()]


def names_of(among: Sequence[Overrides]) -> list[str]:
  """Returns a folder name for each member, made of the settings that differ and without the sections of their keys.

  A name that is too long for a file system, or that two members share, ends in a checksum of the settings.

  Raises:
    ConfigError: two members have the same overrides.
  """
  keys = [jsonfile.dumps(combination, sort_keys=True, default=repr) for combination in among]
  twice = next((combination for combination, key in zip(among, keys, strict=True) if keys.count(key) > 1), None)
  if twice is not None:
    words = ', '.join(f'{key}={value}' for key, value in twice.items()) or 'the config itself'
    raise ConfigError(f'--sweep has {words} twice')
  plain = [_name_of(combination, among) for combination in among]
  return [
    name if len(name) <= _LONGEST and plain.count(name) == 1 else f'{name[:_LONGEST]},{zlib.crc32(key.encode()):08x}'
    for name, key in zip(plain, keys, strict=True)
  ]


def _name_of(overrides: Overrides, among: Sequence[Overrides]) -> str:
  differs = functools.partial(_differs, among=among)
  words = (f'{key.rpartition(".")[2]}={value}' for key, value in overrides.items() if differs(key))
  return re.sub(r'[^\w.=,+-]+', '_', ','.join(words), flags=re.ASCII) or 'only'


def _differs(key: str, among: Sequence[Overrides]) -> bool:
  return len({repr(combination.get(key)) for combination in among}) > 1
