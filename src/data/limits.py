"""Limits on what a file may ask for, checked before anything is allocated, because files may come from strangers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .. import files
from .errors import DataError
from .folders import shown

MOST_BYTES = 2**31  # of one encoded picture, or one text
MOST_PIXELS = 100_000_000  # of one picture or frame
_MOST_PACKED = 250  # a large array may be this many times as large in memory as on disk
_LARGE = 2**30


def read_file(path: str | Path, most: int = MOST_BYTES) -> bytes:
  """Returns the content of a regular file.

  Raises:
    DataError: the path is a device, a pipe or a folder, or the file is larger than `most` bytes or cannot be read.
  """
  try:
    return files.read(path, most)
  except ValueError as error:
    raise DataError(f'{shown(path)} cannot be read: {error}') from error
  except OSError as error:
    raise DataError(f'{shown(path)} cannot be read: {error.strerror}') from error


def check_regular(path: str | Path) -> None:
  """Raises DataError if a path exists but is not a regular file, because such a thing may never end or never begin."""
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return  # opening the file will report the reason
  if not stat.S_ISREG(mode):
    raise DataError(f'{shown(path)} cannot be read: it is not a regular file')


def check_pixels(width: int, height: int) -> None:
  """Raises ValueError if a picture has too many pixels."""
  if width * height > MOST_PIXELS:
    raise ValueError(f'{width}x{height} pixels are more than {MOST_PIXELS:,}; make it smaller')


def check_size(needed: int, stored: int, what: str) -> None:
  """Checks that an array fits in the free memory, and is not far larger than its file can hold.

  Args:
    needed: bytes in memory.
    stored: bytes in the file.
    what: words for the array, for the message.

  Raises:
    DataError: it needs more memory than is free; or more than 2^30 bytes, and more than 250 times those of its file.
  """
  if needed > _LARGE and needed > _MOST_PACKED * stored:
    raise DataError(
      f'{what} claims {in_words(needed)} of {in_words(stored)} in its file; it is damaged, or made to fill the memory'
    )
  free = free_memory()
  if free is not None and needed > free:
    raise DataError(
      f'{what} needs {in_words(needed)} of memory, and {in_words(free)} are free; take a smaller part of it'
    )


def free_memory() -> int | None:
  """Returns the number of bytes that this process may still take; None if the system does not say."""
  amounts = []
  try:
    lines = Path('/proc/meminfo').read_text().splitlines()
    amounts += [1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable')]
  except OSError:
    return None
  for limit, used in (
    ('memory.max', 'memory.current'),
    ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
  ):
    try:
      most, now = (Path('/sys/fs/cgroup', name).read_text().strip() for name in (limit, used))
      amounts += [int(most) - int(now)] if most.isdigit() else []
    except OSError:
      continue
  return min(amounts, default=None)


def in_words(n: float) -> str:
  """Returns a number `n` of bytes as text, with a unit, such as '1.5 GB'."""
  for unit in ('B', 'KB', 'MB', 'GB'):
    if n < 1000:
      return f'{n:.3g} {unit}'
    n /= 1000
  return f'{n:.3g} TB'
