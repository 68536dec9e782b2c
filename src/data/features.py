"""A check of the features that prepared sets name: TFDS imports their classes, and so would run a stranger's code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError
from .limits import read_file

_OWN, _MOST = 'tensorflow_datasets.core.features.', 2**24  # bytes


def check_features(folder: Path) -> None:
  """Refuses prepared sets whose `features.json` names code that is not TFDS's, which TFDS would import and run.

  Raises:
    DataError: a file names such code, or cannot be read.
  """
  for path in sorted(folder.rglob('features.json')) if folder.is_dir() else ():
    try:
      description = json.loads(read_file(path, _MOST))
    except ValueError as error:
      raise DataError(f'{path} cannot be read: {error}') from error
    strange = next((name for name in _classes_named(description) if not name.startswith(_OWN)), None)
    if strange is not None:
      raise DataError(
        f'{path} names {strange!r}, code that is not of TFDS and would be run; prepare the set with features of TFDS alone'
      )


def _classes_named(value: Any) -> Iterator[str]:
  for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
    if key in ('pythonClassName', 'python_class_name', 'type') and isinstance(part, str) and '.' in part:
      yield part
    yield from _classes_named(part)
