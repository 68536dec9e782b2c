"""JSON as the standard has it: numbers that are not finite, which it lacks, are written as null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def dumps(value: Any, **settings: Any) -> str:
  """Returns a value as JSON; `settings` are json.dumps's."""
  return json.dumps(_finite(value), allow_nan=False, **settings)


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


def read_lines(path: Path) -> list[Any]:
  """Returns the rows of a .jsonl file; none where there is no file."""
  text = path.read_text(encoding='utf-8') if path.exists() else ''
  return [read_row(line) for line in text.split('\n') if line.strip()]
