"""Loads libraries of the package's extras. The error for a missing library names the extra that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MissingExtra(ImportError):
  """A library of an extra is not installed. The message is one line with the command that installs it."""


def need(extra: str, *libraries: str) -> None:
  """Checks that libraries can be imported, without importing them.

  Raises:
    MissingExtra: one is not installed.
  """
  roots = [name.partition('.')[0] for name in libraries]
  missing = [name for name in roots if importlib.util.find_spec(name) is None]
  if missing:
    verb = 'is' if len(missing) == 1 else 'are'
    raise MissingExtra(f"{', '.join(missing)} {verb} not installed; pip install 'kronmesh[{extra}]'", name=missing[0])


def load(extra: str, library: str) -> ModuleType:
  """Imports a library of an extra.

  Raises:
    MissingExtra: it is not installed.
  """
  need(extra, library)
  return importlib.import_module(library)
