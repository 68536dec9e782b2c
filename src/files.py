"""Files that are written whole or not at all, never through a link, and that survive a power cut.

A rename alone promises nothing: the disk may keep the new name and lose the content. So the content is synced to the
disk before the rename, and the folder after it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_NO_LINK = getattr(os, 'O_NOFOLLOW', 0)
_NO_WAIT = getattr(os, 'O_NONBLOCK', 0)  # opening a pipe does not wait for its other end


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
  """Opens a new file for writing, which replaces `path` when the context ends without an error.

  The new file gets a random name that did not exist, so nobody can have put a link there. A link at `path` itself is
  replaced, not followed.

  Raises:
    OSError: the folder cannot be written; then nothing is left behind.
  """
  path = Path(path)
  new = path.with_name(f'.{path.name[:100]}.{secrets.token_hex(8)}.new')
  try:
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666), 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)
  except BaseException:
    with contextlib.suppress(OSError):
      new.unlink(missing_ok=True)
    raise


def read(path: str | Path, most: int) -> bytes:
  """Returns the content of a regular file of at most `most` bytes.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file is larger, or it is a device, a pipe or the like, which may never begin or end.
  """
  with open(os.open(path, os.O_RDONLY | _NO_WAIT), 'rb') as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
      raise ValueError('it is not a regular file')
    if status.st_size > most:
      raise ValueError(f'it has {status.st_size:,} bytes, more than {most:,}')
    return file.read(most)


def write(path: str | Path, content: str | bytes) -> None:
  """Replaces a file with one that has this content; text is written as UTF-8.

  Raises:
    OSError: the folder cannot be written; then the old file stays.
  """
  with replacing(path) as file:
    file.write(content.encode() if isinstance(content, str) else content)


def make_own(path: str | Path) -> None:
  """Replaces this name of a file that has several (hard links) with a copy, so that writing to it changes no other.

  Raises:
    OSError: the folder cannot be written.
  """
  path = Path(path)
  if path.is_symlink() or not path.is_file() or path.stat().st_nlink == 1:
    return
  content = path.read_bytes()
  write(path, content)


def append_lines(path: str | Path, lines: Iterable[str], sync: bool = False) -> None:
  """Appends lines to a file in one write, and creates the file if need be.

  If a killed process has left the last line unfinished, that line is ended first, so that it spoils no other.

  Args:
    path: the file.
    lines: lines without their ends; they are written as UTF-8.
    sync: whether the lines are on the disk when this returns.

  Raises:
    OSError: the file cannot be written, or is a link (ELOOP).
  """
  text = ''.join(f'{line}\n' for line in lines)
  make_own(path)
  how = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_LINK | _NO_WAIT
  with open(os.open(path, how, 0o666), 'r+b', buffering=0) as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise OSError(errno.EINVAL, 'it is not a regular file', os.fspath(path))
    size = os.fstat(file.fileno()).st_size
    unfinished = size and os.pread(file.fileno(), 1, size - 1) != b'\n'
    rest = memoryview(f'{chr(10) if unfinished else ""}{text}'.encode())
    while rest:
      rest = rest[file.write(rest) :]
    if sync:
      os.fsync(file.fileno())


def sync_file(path: str | Path) -> None:
  """Waits until a file's content is on the disk; does nothing if the file does not exist."""
  with contextlib.suppress(FileNotFoundError):
    _sync(path, os.O_RDONLY | _NO_LINK | _NO_WAIT)


def sync_folder(path: str | Path) -> None:
  """Waits until the names in a folder are on the disk."""
  _sync(path, os.O_RDONLY | getattr(os, 'O_DIRECTORY', 0))


def _sync(path: str | Path, how: int) -> None:
  number = os.open(path, how)
  try:
    os.fsync(number)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
      raise
  finally:
    os.close(number)


def sync_tree(folder: str | Path) -> None:
  """Waits until all files and folders under a folder are on the disk, the innermost first."""
  for where, _, names in os.walk(folder, topdown=False):
    for name in names:
      path = os.path.join(where, name)
      if stat.S_ISREG(os.lstat(path).st_mode):
        sync_file(path)
    sync_folder(where)


def first_odd(path: str | Path) -> tuple[Path, str] | None:
  """Returns the first path, at or below `path`, that is neither a file nor a folder, and what it is; or None."""
  paths = [os.fspath(path)] if os.path.lexists(path) else []
  for where, folders, names in os.walk(path):
    paths += (os.path.join(where, name) for name in (*folders, *names))
  for one in paths:
    mode = os.lstat(one).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
      return Path(one), 'a link' if stat.S_ISLNK(mode) else 'no file'
  return None
