"""JSON as the standard has it: numbers that are not finite, which it lacks, are written as null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple


def dumps(value: Any, **settings: Any) -> str:
  """Returns a value as JSON; `settings` are json.dumps's."""
  return json.dumps(_finite(value), allow_nan=False, **settings)


def loads(text: str) -> Any:
  """Returns what a text of JSON holds."""
  return json.loads(text)


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
  return _numbers(json.loads(line))


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
  """Reads the rows of a .jsonl file, which are objects; there are none where there is no file."""
  rows, bad = [], 0
  *whole, last = path.read_bytes().split(b'\n') if path.exists() else [b'']
  for line in (*whole, last):
    try:
      row = read_row(line.decode())
      if not isinstance(row, dict):
        raise ValueError('no row')
      rows.append(row)
    except (ValueError, RecursionError):
      bad += bool(line.strip()) and line is not last
  return Lines(rows, bad)
