"""JSON as the standard has it: numbers that are not finite, which it lacks, are written as null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import ConfigError
from kronmesh import files

_LARGEST = 2**24  # bytes of a file, or of a line
_MOST = 2**30  # bytes of a file of rows


def dumps(value: Any, **settings: Any) -> str:
  """Returns a value as JSON; `settings` are json.dumps's."""
  return json.dumps(_finite(value), allow_nan=False, **settings)


def loads(text: str) -> Any:
  """Returns what a text of JSON holds.

  Raises:
    ValueError: it is none, or brackets stand within brackets beyond all reason.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def read(path: Path) -> Any:
  """Returns what a file of JSON holds.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no regular file, too large (16 MB), or no JSON.
  """
  return loads(files.read(path, _LARGEST).decode())


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_row(line: str) -> Any:
  """Returns a line of numbers; null, as `dumps` writes what is not finite, is NaN.

  Raises:
    ValueError: the line is no JSON.
  """
  return _numbers(loads(line))


def _numbers(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _numbers(x) for key, x in value.items()}
  if isinstance(value, list):
    return [_numbers(x) for x in value]
  return math.nan if value is None else value


class Lines(NamedTuple):
  """The rows of a .jsonl file. bad: how many lines could not be read, but for a last one that was never finished."""

  rows: list[dict[str, Any]]
  bad: int


def read_lines(path: Path) -> Lines:
  """Reads the rows of a .jsonl file, which are objects; there are none where there is no file.

  Raises:
    ConfigError: the file has more than 1 GB.
  """
  rows, bad = [], 0
  if not path.exists():
    return Lines(rows, bad)
  if not path.is_file():
    return Lines(rows, 1)
  if path.stat().st_size > _MOST:
    raise ConfigError(f'{path} has {path.stat().st_size / 1e9:.1f} GB, more than a run writes; move it away')
  with path.open('rb') as file:
    while line := file.readline(_LARGEST):
      whole = line.endswith(b'\n')
      if not whole and len(line) == _LARGEST:  # a line beyond all reason: passed over to its end
        while (rest := file.readline(_LARGEST)) and not rest.endswith(b'\n'):
          pass
        bad += 1
        continue
      try:
        row = read_row(line.decode())
        if not isinstance(row, dict):
          raise ValueError('no row')
        rows.append(row)
      except ValueError:
        bad += bool(line.strip()) and whole
  return Lines(rows, bad)
