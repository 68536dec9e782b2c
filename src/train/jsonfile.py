"""JSON as the standard defines it: numbers that are not finite, which JSON lacks, are written as null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from .errors import ConfigError

_LARGEST = 2**24  # bytes of a file, or of a line
_MOST = 2**30  # bytes of a file of rows


def dumps(value: Any, **settings: Any) -> str:
  """Returns a value as JSON; `settings` are passed to json.dumps."""
  return json.dumps(_finite(value), allow_nan=False, **settings)


def loads(text: str) -> Any:
  """Returns the value of a JSON text.

  Raises:
    ValueError: the text is not JSON, or it is nested too deeply.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def read(path: Path) -> Any:
  """Returns the value of a JSON file.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not a regular file, it is too large (16 MB), or it is not JSON.
  """
  return loads(files.read(path, _LARGEST).decode())


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_row(line: str) -> Any:
  """Returns a row of numbers from a line of JSON; null, which `dumps` writes for non-finite numbers, becomes NaN.

  Raises:
    ValueError: the line is not JSON.
  """
  return _numbers(loads(line))


def _numbers(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _numbers(x) for key, x in value.items()}
  if isinstance(value, list):
    return [_numbers(x) for x in value]
  return math.nan if value is None else value


class Lines(NamedTuple):
  """The rows of a .jsonl file. bad: the number of unreadable lines, not counting an unfinished last one."""

  rows: list[dict[str, Any]]
  bad: int


def read_lines(path: Path) -> Lines:
  """Reads the rows of a .jsonl file, which are objects; a missing file has no rows.

  Raises:
    ConfigError: the file is larger than 1 GB.
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
      if not whole and len(line) == _LARGEST:  # the line is too long: skip to its end
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
