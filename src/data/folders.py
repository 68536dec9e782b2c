"""Folders that people fill: which of their files are data, and which are left out, counted and listed."""

from __future__ import annotations

import collections
import os
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from .. import files
from .errors import DataError

# Names that systems and tools put into folders. Names that begin with a dot are passed over too.
_OF_SYSTEMS = ('$RECYCLE.BIN', '@eaDir', 'Desktop.ini', 'System Volume Information', 'Thumbs.db', '__MACOSX',
               'desktop.ini', 'lost+found')  # fmt: skip


class LeftOut(NamedTuple):
  """A file that is not used, and the reason."""

  path: Path
  why: str


class Files(NamedTuple):
  """The files of a folder that are data, in the order of their names, and those that are left out."""

  used: list[Path]
  left_out: list[LeftOut]


def is_passed_over(name: str) -> bool:
  """Returns whether a file or folder of this name belongs to a system or a tool and is not data."""
  return name.startswith('.') or name in _OF_SYSTEMS


def subfolders(root: Path) -> list[Path]:
  """Returns the folders in a folder, including links to folders, in the order of their names.

  Raises:
    DataError: the folder cannot be read.
  """
  return [p for p in _listed(root) if p.is_dir()]


def files_below(root: Path, endings: Sequence[str]) -> Files:
  """Returns the files of a folder and of all folders below it.

  Links to folders are followed, but not round in a circle.

  Args:
    root: the folder.
    endings: endings of the files that are data, in lower case, with their dots.

  Returns:
    A named tuple of `used`, the paths of the data in the order of their names, and `left_out`, the others, each with
    its `path` and the reason, `why`. Files of systems and tools are in neither.

  Raises:
    DataError: a folder cannot be read.
  """
  files = Files([], [])
  _visit(root, endings, (), files)
  return files


def _visit(folder: Path, endings: Sequence[str], above: tuple[str, ...], files: Files) -> None:
  real = os.path.realpath(folder)
  if real in above:
    files.left_out.append(LeftOut(folder, 'links that lead round in a circle'))
    return
  for path in _listed(folder):
    if path.is_dir():
      _visit(path, endings, (*above, real), files)
    elif not path.exists():
      files.left_out.append(LeftOut(path, 'broken links'))
    elif not path.is_file():
      files.left_out.append(LeftOut(path, 'no regular files'))
    elif path.suffix.lower() in endings:
      files.used.append(path)
    else:
      files.left_out.append(LeftOut(path, path.suffix.lower() or 'files without an ending'))


def loose_files(folder: Path, why: str) -> list[LeftOut]:
  """Returns the files that lie directly in a folder, as left out."""
  return [LeftOut(p, why) for p in _listed(folder) if not p.is_dir()]


def _listed(folder: Path) -> list[Path]:
  try:
    return sorted(p for p in folder.iterdir() if not is_passed_over(p.name))
  except OSError as error:
    raise DataError(f'{shown(folder)} cannot be read: {error.strerror}') from error


def class_name(folder: Path) -> str:
  """Returns a folder's name as the name of a class, composed (NFC): systems store the same name in two ways."""
  return shown(unicodedata.normalize('NFC', folder.name))


def tell_left_out(name: str, left_out: Sequence[LeftOut], used: int, kept: Path) -> None:
  """Warns of files that are left out: how many, why, the first one, and where all are listed.

  Args:
    name: name of the data set.
    used: number of files that are used.
    kept: the folder in which the list is written.
  """
  if not left_out:
    return
  counts = collections.Counter(f.why for f in left_out)
  why, first = ', '.join(f'{count} {reason}' for reason, count in counts.most_common(5)), left_out[0].path
  words = f'{name}: {len(left_out)} of {used + len(left_out)} files are left out ({why}), the first {shown(first)}'
  path = kept / f'{name.replace("/", "-")}-{zlib.crc32(os.fsencode(first.parent)):08x}.txt'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, ''.join(f'{shown(f.path)}: {f.why}\n' for f in left_out))
    logging.warning('%s; %s lists them', words, path)
  except OSError:  # the warning is what counts
    logging.warning('%s', words)


def shown(path: str | Path) -> str:
  """Returns `path` as one line of text; bytes that are not UTF-8 and characters that do not print are escaped."""
  raw = os.fsencode(path).decode('utf-8', 'backslashreplace')
  plain = lambda c: c.isprintable() or unicodedata.category(c) == 'Zs'  # a space of any width  # noqa: E731
  return ''.join(c if plain(c) else c.encode('unicode_escape').decode() for c in raw)


def listed(names: Iterable[str], most: int = 5) -> str:
  """Returns the first few of some names, and the number of the others."""
  names = [repr(n) for n in names]
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
