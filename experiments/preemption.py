"""Being told to stop: SIGTERM; SIGUSR1, which Slurm sends before a job's time is over (--signal=USR1@300); SIGHUP, which
comes when a terminal closes.

One process stops after the step that runs. Several ask each other when they look at the device, so that all stop after the
same step. (JAX's own preemption service agrees without that, but forgets a signal that comes before the first step, and
its counter is moved by Orbax's saves.)
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from experiments import processes
from experiments.starting import STOP


class Preemption:
  """While entered, `reached` says after a step whether to save and stop there."""

  def __init__(self):
    self._told, self._before = False, {}

  def __enter__(self) -> Preemption:
    if threading.current_thread() is threading.main_thread():
      heard = [s for s in STOP if signal.getsignal(s) != signal.SIG_IGN]  # nohup has SIGHUP ignored
      self._before = {s: signal.signal(s, self._tell) for s in heard}
      if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # an exception from here on: a run reports how it ended
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
    """To be called by all processes after every step; `looks`: whether the host looks at the device after it."""
    if not processes.several():
      return self._told
    return looks and processes.any_of(self._told)
