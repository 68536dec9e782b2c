"""A watchdog for several processes: when one hangs, raises or dies, the others end and say which one it was.

The runtime notices a process that is gone, but not one that hangs, because a hanging process keeps its heartbeat. So
every process keeps a mark in a shared folder. The mark is a file with a number that grows while the process lives, the
step that it has begun, what it is doing and where.

Time is counted in pulses of a thread in each process, not read from a clock. So clocks may jump, and a job that a
scheduler pauses as a whole and continues later (SIGSTOP and SIGCONT) raises no alarm.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import jax

from ... import files
from ..errors import STOPPED, is_common
from . import processes

_PULSE = 1.0  # seconds between two marks
_SILENT = 20  # pulses without a new mark after which a process or its machine counts as gone
_COMPILES = 10  # times as many while compiling, which may hold the interpreter or starve on a loaded machine
_GRACE = 5  # pulses to wait, because an error that ends all processes is reported by each itself
_BUSY = 0.005  # share of a processor above which a process is working; waiting for a file takes none
_AT_WORK = ('starts', 'waits', 'trains', 'compiles', 'ended')  # words of a mark; any others say why a process stopped
_COMPILER = tuple(os.path.join('jax', '_src', *end) for end in (('compiler.py',), ('interpreters', 'mlir.py'),
                  ('interpreters', 'partial_eval.py')))  # fmt: skip
_CHILD = 'subprocess.py'  # a child's work is not counted as this process's
_WAITING = os.path.join('runtime', 'processes.py')
_OURS = (f'{Path(files.__file__).parent}{os.sep}',)


class Mark(NamedTuple):
  """A process's report about itself. place: the file and line of our code that it has reached."""

  pulse: int
  step: int
  words: str
  place: str


class Seen(NamedTuple):
  """The last mark of another process, and the number of pulses since it changed."""

  mark: Mark
  age: int


class Watchdog:
  """A context manager that marks this process, and ends it when another one stops or nothing happens for too long.

  With one process it does nothing.

  Args:
    seconds: the time limit of a step, to which ten times the longest step so far is added; compilation does not count.
      While the processes start, at least one must compute something within this time. 0: no limit.
    folder: the folder for this job's marks, shared by all processes.
  """

  def __init__(self, seconds: float, folder: Path):
    self.seconds, self.folder, self.step = seconds, folder, 0
    self.own = folder / str(jax.process_index()) if processes.several() else folder
    self.main, self.done = threading.current_thread(), threading.Event()
    self.started = False  # whether the first step has begun
    self.pulse = self.idle = self.longest = 0
    self.pauses = 0
    self.others: dict[int, Seen] = {}
    self.used = 0.0
    self.thread = threading.Thread(target=self._watch, daemon=True)

  def beat(self, step: int | None = None) -> None:
    """Records that this process begins a step, or does something between two steps."""
    if self.started:
      self.longest = max(self.longest, self.idle)
    self.started, self.idle = True, 0
    self.step = self.step if step is None else step

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops counting idle time during work that may take long, such as saving and restoring."""
    self.pauses += 1
    try:
      yield
    finally:
      self.pauses -= 1
      self.idle = 0

  def __enter__(self) -> Watchdog:
    if processes.several():
      self.folder.mkdir(parents=True, exist_ok=True)
      self._mark('starts', '')
      self.thread.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.done.set()
    if not processes.several():
      return
    self.thread.join(2 * _PULSE)
    if value is None or is_common(value):
      self._mark('ended', '')
    elif isinstance(value, Exception) and processes.is_lost(value):
      processes.stop(self._who_is_lost() or processes.lost(value), STOPPED)
    else:
      self._mark(f'{type(value).__name__}: {(str(value).splitlines() or [""])[0][:200]}', '')
      self._linger()

  def _mark(self, words: str, place: str) -> None:
    self.pulse += 1
    new = self.own.with_suffix('.new')
    with contextlib.suppress(OSError):  # the training loop reports a full disk
      new.write_text(f'{self.pulse}\n{self.step}\n{place}\n{words}')
      new.replace(self.own)

  def _look(self) -> None:
    """Reads the marks of the other processes."""
    for number in set(range(jax.process_count())) - {jax.process_index()}:
      try:
        pulse, step, place, words = (self.folder / str(number)).read_text().split('\n', 3)
        mark = Mark(int(pulse), int(step), words, place)
      except (OSError, ValueError):
        continue  # it has not started yet
      before = self.others.get(number)
      age = before.age + 1 if before is not None and before.mark.pulse == mark.pulse else 0
      self.others[number] = Seen(mark, age)

  def _who_is_lost(self) -> str | None:
    """Says which process stopped, once its mark says so or has grown old; None if none does in time."""
    for _ in range(6):
      self._mark('trains', '')
      self._look()
      for number, (mark, age) in self.others.items():
        if mark.words not in _AT_WORK:
          return f'process {number} stopped at step {mark.step}: {mark.words}'
        if age >= 3 and mark.words != 'ended':
          return f'process {number} died at step {mark.step}'
      time.sleep(_PULSE)
    return None

  def _watch(self) -> None:
    wrong_for, self.used = 0, _used()
    while not self.done.wait(_PULSE):
      words, place = self._doing()
      self._mark(words, place)
      self._look()
      marks = {n: seen.mark for n, seen in self.others.items()}
      marks[jax.process_index()] = Mark(self.pulse, self.step, words, place)
      works = any(m.words in ('compiles', 'starts') for m in marks.values())
      self.idle = 0 if works or self.pauses else self.idle + 1
      wrong = {n: m for n, m in marks.items() if m.words not in (*_AT_WORK, 'hangs')}
      wrong_for = wrong_for + 1 if wrong else 0
      if wrong_for > _GRACE:
        number, mark = next(iter(wrong.items()))
        processes.stop(f'process {number} stopped at step {mark.step}: {mark.words}', STOPPED)
      for number, (mark, age) in self.others.items():
        patience = _SILENT * (_COMPILES if mark.words == 'compiles' else 1)
        if mark.words != 'ended' and age > patience:
          self._stop(f'process {number} gives no sign since {patience} seconds: it is frozen, or its machine gone')
      limit = self.seconds + 10 * self.longest
      if self.seconds and self.idle * _PULSE > limit and not wrong:
        self._stop(f'{_who_hangs(marks)}; nothing done for {limit:.0f} seconds (see config.watchdog_seconds)')

  def _doing(self) -> tuple[str, str]:
    """Returns what the main thread does, as a mark's words, and the line of our code that it has reached.

    Before the first step, 'starts' means that it computes something and 'hangs' that it does nothing.
    """
    before, self.used = self.used, _used()
    frames = list(_frames(sys._current_frames().get(self.main.ident)))
    names = [frame.f_code.co_filename for frame in frames]
    place = next((f'{Path(f.f_code.co_filename).name}:{f.f_lineno}' for f in frames if _is_ours(f)), '')
    if any(name.endswith(_WAITING) for name in names):  # checked first, since processes connect within the compiler
      return 'waits', place
    if any(name.endswith(_COMPILER) for name in names):
      return 'compiles', place
    if self.started:
      return 'trains', place
    works = self.used - before > _BUSY * _PULSE or any(name.endswith(_CHILD) for name in names)
    return ('starts' if works else 'hangs'), place

  def _linger(self) -> None:
    """Delays the end of process 0, the runtime's leader, since it would end the others before they can read why."""
    if processes.chief():
      time.sleep((_GRACE + 3) * _PULSE)

  def _stop(self, words: str) -> None:
    self._mark(words, '')
    self._linger()
    processes.stop(words, STOPPED)


def _who_hangs(marks: dict[int, Mark]) -> str:
  """Says which process keeps the others waiting."""
  stuck = [n for n, mark in sorted(marks.items()) if mark.words == 'hangs']
  if stuck:
    return f'process {stuck[0]} hangs at {marks[stuck[0]].place or "its start"}'
  last = max(mark.step for mark in marks.values())
  behind = [n for n, mark in sorted(marks.items()) if mark.step == min(m.step for m in marks.values())]
  if len(behind) < len(marks):
    return f'process {behind[0]} hangs, it has not come to step {last}'
  return 'all processes wait in the same step'


def _used() -> float:
  """Returns the processor seconds that this process has used, without those of the calling thread."""
  return time.process_time() - time.thread_time()


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
  while frame is not None:
    yield frame
    frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
  return frame.f_code.co_filename.startswith(_OURS)
