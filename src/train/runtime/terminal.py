"""Standard streams whose loss does not end a run: a closed pipe, a full disk or a closed terminal."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

_LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG)


class Lossy:
  """A stream that drops text that it can no longer write.

  It reports the first failure on the other stream, if that one works.
  """

  def __init__(self, stream: Any, name: str, other: Any):
    self._stream, self._name, self._other, self._lost = stream, name, other, False

  def write(self, text: str) -> int:
    self._attempt(lambda: self._stream.write(text))
    return len(text)

  def flush(self) -> None:
    self._attempt(self._stream.flush)

  def writelines(self, lines: Any) -> None:
    for line in lines:
      self.write(line)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _attempt(self, action: Any) -> None:
    if self._lost:
      return
    try:
      action()
    except (OSError, ValueError) as error:  # a closed stream raises ValueError
      if isinstance(error, OSError) and error.errno not in _LOST:
        raise
      self._lost = True
      self._silence()
      if getattr(error, 'errno', None) != errno.EPIPE:  # whoever closes a pipe has seen enough
        self._tell(f'{self._name} cannot be written ({error}); what follows is not shown\n')

  def _silence(self) -> None:
    """Sends the text that Python still buffers to the null device, so that it cannot fail again at exit."""
    try:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    except (OSError, ValueError):
      return

  def _tell(self, words: str) -> None:
    try:
      self._other.write(words)
      self._other.flush()
    except (OSError, ValueError):
      return


def keep_running_without() -> None:
  """Replaces sys.stdout and sys.stderr with streams whose loss does not end the run."""
  for name in ('stdout', 'stderr'):  # None if closed before Python started
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  (to the end)
  out, error = sys.stdout, sys.stderr
  if not isinstance(out, Lossy):
    sys.stdout, sys.stderr = Lossy(out, 'standard output', error), Lossy(error, 'standard error', out)
