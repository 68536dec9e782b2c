"""Signal handling before a command can save: while Python imports, and while a run is built or restored.

Importing JAX takes seconds. This module is loaded before JAX and imports nothing slow.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from ..errors import AGAIN, INTERRUPTED

_STOP = ('SIGTERM', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGHUP')
STOP = tuple(signal.Signals[name] for name in _STOP if name in signal.Signals.__members__)
WITH_PARENT = 'KRONMESH_STOP_WITH_PARENT'  # set for a process that must not outlive its parent
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


def is_command() -> bool:
  """Checks whether this process runs one of our commands rather than a program that imports us."""
  main = getattr(sys.modules['__main__'], '__file__', None)
  package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
  root = os.path.dirname(package)
  folders = [package, f'{root}/experiments', f'{root}/scripts']
  return main is not None and os.path.dirname(os.path.realpath(main)) in folders


def patience() -> float:
  """Returns the seconds to wait for a work folder that another process holds.

  When a sweep was killed and is started again, its earlier members may still be saving.
  """
  return 120.0 if os.environ.get(WITH_PARENT) else 0.0


def answer_signals() -> None:
  """Installs handlers that end the process at once when it is told to stop (75) or interrupted (130).

  Nothing is lost, because nothing has begun. While a run takes steps, `Preemption` replaces these handlers: it saves
  first and lets the run report an interruption. A signal that is ignored stays ignored, such as SIGHUP under nohup or
  SIGINT in a shell's background jobs.
  """
  for number in STOP:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _stop)
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, _interrupt)
  if os.environ.get(WITH_PARENT) and sys.platform == 'linux':
    import ctypes

    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)
    if os.environ[WITH_PARENT] != str(os.getppid()):  # the parent has already ended
      _end('error: told to stop before the first step; the same command goes on', AGAIN)


def _stop(number: int, frame: FrameType | None) -> None:
  del number, frame
  _end('error: told to stop; the same command goes on', AGAIN)


def _interrupt(number: int, frame: FrameType | None) -> None:
  del number, frame
  _end('error: interrupted; the same command goes on', INTERRUPTED)


def _end(words: str, code: int) -> None:
  try:
    os.write(2, f'{words}\n'.encode())
  finally:
    os._exit(code)  # an exception during an import is swallowed or blamed on the import
