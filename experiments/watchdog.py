"""When one of several processes hangs, raises or dies, the others end, and say which it was.

The runtime notices a process that is gone, but not one that hangs: that keeps its heartbeat. So every process keeps a mark
in the work folder: a file whose age says whether it lives, with the step it has begun, and what it is doing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jax

from experiments import processes
from experiments.errors import STOPPED, RunError

_PULSE = 1.0  # seconds between two marks
_SILENT = 20.0  # seconds without a mark after which a process counts as gone: frozen, or its machine
_GRACE = 5.0  # for what ends all processes alike: each says so itself
_AT_WORK = ('trains', 'compiles', 'ended')  # what marks say; all else is why a process stopped


class Watchdog:
  """While entered: marks this process, and ends it when another stopped, or when nothing is done for too long.

  With one process it does nothing.

  Args:
    seconds: in which a step must be done, beside ten times the longest before it, and compilation; 0: no limit.
    workdir: the run's folder, which all share, without the marks of an earlier run.
  """

  def __init__(self, seconds: float, workdir: Path):
    self.seconds, self.folder, self.step = seconds, workdir / '.processes', 0
    self.own = self.folder / str(jax.process_index())
    self.main, self.done = threading.current_thread(), threading.Event()
    self.last, self.longest = None, 0.0
    self.thread = threading.Thread(target=self._watch, daemon=True)

  def beat(self, step: int | None = None) -> None:
    """This process begins a step, or does something between two."""
    now = time.monotonic()
    if self.last is not None:
      self.longest = max(self.longest, now - self.last)
    self.step, self.last = self.step if step is None else step, now

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For what may take its time: saves, restoring."""
    self.last = None
    yield
    self.last = time.monotonic()

  def __enter__(self) -> Watchdog:
    if processes.several():
      self.folder.mkdir(exist_ok=True)
      self._mark('trains')
      self.thread.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.done.set()
    if not processes.several():
      return
    self.thread.join(2 * _PULSE)
    if value is None or isinstance(value, RunError):
      self._mark('ended')
    elif isinstance(value, Exception) and processes.is_lost(value):
      processes.stop(self._who_is_lost() or processes.lost(value), STOPPED)
    else:
      self._mark(f'{type(value).__name__}: {(str(value).splitlines() or [""])[0][:200]}')
      self._linger()

  def _mark(self, words: str) -> None:
    new = self.own.with_suffix('.new')
    with contextlib.suppress(OSError):  # a full disk is the loop's to tell
      new.write_text(f'{self.step}\n{words}')
      new.replace(self.own)

  def _others(self) -> dict[int, tuple[float, int, str]]:
    """For each other process the age of its mark, its step, and what it does."""
    now, found = self.own.stat().st_mtime, {}
    for number in set(range(jax.process_count())) - {jax.process_index()}:
      path = self.folder / str(number)
      try:
        age, (step, words) = now - path.stat().st_mtime, path.read_text().split('\n', 1)
        found[number] = age, int(step), words
      except (OSError, ValueError):
        continue  # not begun yet
    return found

  def _who_is_lost(self) -> str | None:
    """The process that stopped, once its mark says so or has grown old."""
    end = time.monotonic() + 5 * _PULSE
    while time.monotonic() < end:
      self._mark('trains')
      for number, (age, step, words) in self._others().items():
        if words not in _AT_WORK:
          return f'process {number} stopped at step {step}: {words}'
        if age > 3 * _PULSE and words != 'ended':
          return f'process {number} died at step {step}'
      time.sleep(_PULSE / 4)
    return None

  def _watch(self) -> None:
    seen_wrong = None
    while not self.done.wait(_PULSE):
      compiles = _compiles(self.main)
      self._mark('compiles' if compiles else 'trains')
      others = self._others()
      last = self.last  # which the loop may take away meanwhile
      if last is not None and (compiles or any(words == 'compiles' for _, _, words in others.values())):
        self.last = last = time.monotonic()
      wrong = {n: (step, words) for n, (_, step, words) in others.items() if words not in _AT_WORK}
      if wrong:
        seen_wrong = seen_wrong or time.monotonic()
        if time.monotonic() - seen_wrong > _GRACE:
          number, (step, words) = next(iter(wrong.items()))
          processes.stop(f'process {number} stopped at step {step}: {words}', STOPPED)
      silent = [n for n, (age, _, words) in others.items() if age > _SILENT and words != 'ended']
      if silent:
        self._stop(f'process {silent[0]} gives no sign since {_SILENT:g} seconds: it is frozen, or its machine gone')
      limit = self.seconds + 10 * self.longest
      if self.seconds and last is not None and time.monotonic() - last > limit:
        self._stop_for_silence(others, limit)

  def _stop_for_silence(self, others: dict[int, tuple[float, int, str]], limit: float) -> None:
    here = jax.process_index()
    steps = {n: step for n, (_, step, _) in others.items()} | {here: self.step}
    behind = [n for n, step in steps.items() if step == min(steps.values())]
    if len(behind) < len(steps):
      who = f'process {behind[0]} hangs, it has not come to step {max(steps.values())}'
    else:
      who = 'all processes wait in the same step'
    self._stop(f'{who}; nothing done for {limit:.0f} seconds (see config.watchdog_seconds)')

  def _linger(self) -> None:
    """The first process is the runtime's leader: without it the others are ended before they can read why."""
    if processes.chief():
      time.sleep(_GRACE + 3 * _PULSE)

  def _stop(self, words: str) -> None:
    self._mark(words)
    self._linger()
    processes.stop(words, STOPPED)


def _compiles(thread: threading.Thread) -> bool:
  """Whether a thread is in the compiler, which may take minutes."""
  frame = sys._current_frames().get(thread.ident)
  while frame is not None:
    if frame.f_code.co_filename.endswith(os.path.join('jax', '_src', 'compiler.py')):
      return True
    frame = frame.f_back
  return False
