"""Being told to stop: SIGTERM, and SIGUSR1, which Slurm sends before a job's time is over (--signal=USR1@300).

One process notes the signal and stops after the step that runs. Of several, JAX's preemption service notes SIGTERM and has
all agree on the same step, without communication at every step.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from experiments import processes

_ALONE = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
  """While entered, `reached` says after a step whether to save and stop there."""

  def __init__(self):
    self._told, self._before = False, {}

  def __enter__(self) -> Preemption:
    if threading.current_thread() is threading.main_thread():
      # SIGTERM stays the service's, where there are several.
      own = (signal.SIGUSR1,) if processes.several() else _ALONE
      self._before = {s: signal.signal(s, self._tell) for s in own}
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _tell(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    if processes.several():
      os.kill(os.getpid(), signal.SIGTERM)
    self._told = True

  def reached(self, step: int) -> bool:
    """To be called by all processes after the same steps."""
    if not processes.several():
      return self._told
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
