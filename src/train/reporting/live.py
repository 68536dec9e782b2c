"""The page of a run while it trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from ..errors import Preempted, StorageError
from ..runtime.workdir import Events, read_rows
from .report import write_report

_EVERY = 30.0  # seconds
_SHARE = 0.01  # the largest share of the time that the page may take


class LivePage:
  """The page of a run in training, which is renewed at most every 30 seconds and for at most a hundredth of the time.

  Args:
    workdir: the run's folder.
    chief: whether this process writes the folder's files.
    check: a function that raises an error if the folder must no longer be written.
  """

  def __init__(self, workdir: Path, chief: bool, check: Callable[[], None]):
    self.workdir, self.chief, self.check = workdir, chief, check
    self.after = time.monotonic() + _EVERY / 3  # the first rows come soon

  def due(self) -> bool:
    return self.chief and time.monotonic() >= self.after

  def renew(self) -> None:
    """Writes the page. An error is only logged, as it must not end the run."""
    start = time.monotonic()
    try:
      self.check()
      write_report(self.workdir, running=True)
    except Exception as error:
      logging.warning('report.html cannot be renewed: %s', ' '.join(str(error).split())[:200])
    end = time.monotonic()
    self.after = end + max(_EVERY, (1 / _SHARE - 1) * (end - start))


@contextlib.contextmanager
def reported(workdir: Path, events: Events, check: Callable[[], None]) -> Iterator[None]:
  """Writes the report when the run begins and however it ends, and records the error that ended it, if any.

  check: raises an error if the folder may no longer be written.
  """
  well = True
  LivePage(workdir, True, check).renew()
  try:
    yield
  except Exception as error:
    well = False
    with contextlib.suppress(OSError, StorageError):  # the disk may be full
      check()
      rows = read_rows(workdir / 'metrics.jsonl')
      kind = 'stopped' if isinstance(error, Preempted) else 'error'
      events.add(kind, rows[-1]['step'] if rows else 0, f'{type(error).__name__}: {error}', tell=False)
    raise
  finally:
    with contextlib.suppress(StorageError):
      check()
      try:
        write_report(workdir)
      except Exception as error:  # a failed report must not end the run
        told = f'report.html cannot be made: {" ".join(str(error).split())[:200]}'
        with contextlib.suppress(OSError):
          events.add('warning', 0, told, tell=well)  # if the run failed, its own error is shown instead
