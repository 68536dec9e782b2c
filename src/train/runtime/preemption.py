"""Stopping on a signal.

The signals are SIGTERM, SIGUSR1 (which Slurm sends before a job's time is over, with --signal=USR1@300) and SIGHUP
(which arrives when a terminal closes). A single process stops after the current step. Several processes ask each other
whenever they look at the device, so that all stop after the same step. JAX's preemption service agrees without that
exchange, but it forgets a signal that arrives before the first step, and Orbax's saves move its counter.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from . import processes
from .starting import STOP


class Preemption:
  """A context manager whose `reached` says after each step whether to save and stop."""

  def __init__(self):
    self._told, self._before = False, {}

  def __enter__(self) -> Preemption:
    if threading.current_thread() is threading.main_thread():
      heard = [s for s in STOP if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP
      self._before = {s: signal.signal(s, self._tell) for s in heard}
      if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # raise from here on, so that the run reports its end
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _tell(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._told = True

  def reached(self, looks: bool) -> bool:
    """Returns whether to stop now. All processes must call it after every step.

    looks: whether the host looks at the device after this step.
    """
    if not processes.several():
      return self._told
    return looks and processes.any_of(self._told)
