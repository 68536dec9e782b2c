"""What a command does with signals before it can save: while Python imports, and while a run is built or restored.

This module comes before JAX is imported, which takes seconds, and imports nothing that is slow.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from experiments.errors import AGAIN, INTERRUPTED

_STOP = ('SIGTERM', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGHUP')
STOP = tuple(signal.Signals[name] for name in _STOP if name in signal.Signals.__members__)
WITH_PARENT = 'KRONMESH_STOP_WITH_PARENT'  # set for a process that must not outlive the one that started it
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


def is_command() -> bool:
  """Returns whether this process runs a file of `experiments` or `scripts`, and not one that imports them."""
  main = getattr(sys.modules['__main__'], '__file__', None)
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  return main is not None and os.path.dirname(os.path.abspath(main)) in [f'{root}/experiments', f'{root}/scripts']


def patience() -> float:
  """Returns the seconds to wait for a work folder that another process has.

  Where a sweep was killed and begun again, its members of before are still saving.
  """
  return 120.0 if os.environ.get(WITH_PARENT) else 0.0


def answer_signals() -> None:
  """Ends the process at once when it is told to stop (75) or interrupted (130); nothing is lost, as nothing has begun.

  While a run's steps are taken, `Preemption` replaces these: it saves first, and lets an interruption be reported. A signal
  that is ignored, as SIGHUP under nohup and SIGINT in a shell's background jobs, stays ignored.
  """
  for number in STOP:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _stop)
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, _interrupt)
  if os.environ.get(WITH_PARENT) and sys.platform == 'linux':
    import ctypes

    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)
    if os.environ[WITH_PARENT] != str(os.getppid()):  # it has ended already
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
    os._exit(code)  # exceptions in the middle of an import are swallowed or told as the import's
