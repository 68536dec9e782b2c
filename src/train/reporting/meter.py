"""A meter of a run's time by part (input, compute, evaluation, checkpoint), its rate and its share of the peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ('input', 'compute', 'evaluation', 'checkpoint')


class Meter:
  """The seconds that each part of a run takes.

  Time outside `of` counts as 'compute', because the host then waits for the device or feeds it.

  Args:
    batch_size: examples per step.
  """

  def __init__(self, batch_size: int):
    self.batch_size = batch_size
    self.seconds = dict.fromkeys(PARTS, 0.0)
    self.mark = time.perf_counter()
    self.inner = 0.0  # seconds of parts since the mark
    self.before: tuple[float, int] | None = None
    self.flops_share = 0.0  # seconds of a step at the peak: its flops over the peak

  @contextmanager
  def of(self, part: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      self.seconds[part] += spent
      self.inner += spent

  def row(self, step: int) -> dict[str, Any]:
    """Returns the seconds so far by part, and the rate since the last row. The first row includes compilation."""
    now = time.perf_counter()
    self.seconds['compute'] += now - self.mark - self.inner
    self.mark, self.inner = now, 0.0
    trained = self.seconds['input'] + self.seconds['compute']
    row = {'step': step, **{f'{part}_seconds': round(s, 4) for part, s in self.seconds.items()}}
    if self.before is not None and step > self.before[1]:
      each = (trained - self.before[0]) / (step - self.before[1])
      row['examples_per_second'] = round(self.batch_size / each, 2)
      if self.flops_share:
        row['mfu'] = round(self.flops_share / each, 4)
    self.before = trained, step
    return row
