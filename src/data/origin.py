"""The origin of prepared records: it is kept beside them and compared with the source that a run names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from .. import files
from .errors import DataError
from .folders import shown

_ENDS = 1 << 16  # bytes at a file's beginning and end that are compared


class Origin(NamedTuple):
  """A description of what records were made from.

  source: its absolute path. files: number of files. stamps: a digest of names, sizes and times. contents: a digest of
  names, sizes and the ends of every file.
  """

  source: str
  files: int
  stamps: str
  contents: str


Entries = Sequence[tuple[str, Path]]  # the name of each file in the set, and its path


def origin_of(source: str | Path, entries: Entries) -> Origin:
  """Returns the origin that describes what a source holds now."""
  contents = hashlib.sha256()
  for name, path in sorted(entries):
    contents.update(f'{_safe(name)}\n'.encode())
    try:
      with path.open('rb') as file:
        size = os.fstat(file.fileno()).st_size
        contents.update(f'{size}\n'.encode() + file.read(_ENDS))
        file.seek(max(_ENDS, size - _ENDS))
        contents.update(file.read(_ENDS))
    except OSError:
      contents.update(b'missing\n')
  return Origin(_absolute(source), len(entries), _stamps(entries), contents.hexdigest())


def keep(records: Path, origin: Origin) -> None:
  """Writes the origin of records that are about to be made in a folder, beside that folder."""
  files.write(_beside(records), json.dumps(origin._asdict(), indent=1) + '\n')


def check(name: str, records: Path, source: str | Path, entries: Entries | None) -> None:
  """Refuses prepared records that were not made from the source that a run names.

  Args:
    name: name of the data set.
    records: the folder of the records.
    source: what the run names; '' stands for whatever the records were made from.
    entries: what the source holds now; None if the source is gone.

  Raises:
    DataError: the records were made from another source, or the source holds something else now.
  """
  try:
    kept = Origin(**json.loads(_beside(records).read_text()))
  except (OSError, ValueError, TypeError):
    logging.warning(
      '%s: the records in %s do not say what they were made of, and are taken for those of %s; remove the folder to '
      'prepare them anew',
      name, shown(records), shown(source) if str(source) else 'this set',
    )  # fmt: skip
    return
  if not str(source):
    return
  remedy = f'choose another --config.data.folder, or remove {shown(records)} to prepare it anew'
  if entries is None:
    if _absolute(source) != kept.source:
      there = f'what is prepared in {shown(records)} was made of {kept.source}'
      raise DataError(f'{name}: {there}, and {shown(source)} does not exist; {remedy}')
    return
  if _absolute(source) == kept.source and _stamps(entries) == kept.stamps:
    return
  now = origin_of(source, entries)
  if now.contents == kept.contents:
    return
  if now.source == kept.source:
    raise DataError(
      f'{name}: {now.source} has changed since {shown(records)} was prepared from it ({kept.files} files then, {now.files} '
      f'now); {remedy}'
    )
  raise DataError(
    f'{name}: what is prepared in {shown(records)} was made of {kept.source}, not of {now.source}; {remedy}'
  )


def _beside(records: Path) -> Path:
  return records.with_name(records.name + '.origin.json')


def _absolute(source: str | Path) -> str:
  return shown(os.path.realpath(source))


def _safe(name: str) -> str:
  return os.fsencode(name).decode('utf-8', 'backslashreplace')


def _stamps(entries: Entries) -> str:
  digest = hashlib.sha256()
  for name, path in sorted(entries):
    try:
      stat = path.stat()
      digest.update(f'{_safe(name)}\n{stat.st_size} {stat.st_mtime_ns}\n'.encode())
    except OSError:
      digest.update(f'{_safe(name)}\nmissing\n'.encode())
  return digest.hexdigest()
