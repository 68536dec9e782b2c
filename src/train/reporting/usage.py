"""What a run has used of its machine so far: seconds of compilation, and memory."""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

_COMPILES = '/jax/core/compile/'  # the events of tracing, lowering and compiling


class Spans:
  """The total length of spans of time, some of which lie inside others; each span is added when it ends."""

  def __init__(self):
    self.total = 0.0
    self._spans: list[tuple[float, float]] = []  # start and length, by start

  def add(self, start: float, end: float) -> None:
    while self._spans and self._spans[-1][0] >= start:  # this span contains that one
      self.total -= self._spans.pop()[1]
    self._spans = [*self._spans[-99:], (start, end - start)]
    self.total += end - start


@functools.lru_cache(maxsize=1)
def compiling() -> Spans:
  """Returns the spans in which this process has compiled since the first call."""
  spans = Spans()

  def heard(event: str, seconds: float, **_: Any) -> None:
    if event.startswith(_COMPILES):
      now = time.perf_counter()
      spans.add(now - seconds, now)

  jax.monitoring.register_event_duration_secs_listener(heard)
  return spans


class Usage:
  """The seconds of compilation while a run trains, and its peak memory.

  devices: the devices of the run that belong to this process.
  """

  def __init__(self, devices: Sequence[Any]):
    self.devices, self.seconds = devices, 0.0
    self.mark = compiling().total

  @contextlib.contextmanager
  def apart(self) -> Iterator[None]:
    """Leaves out what is compiled inside, for parts that are not training, such as an evaluation."""
    before = compiling().total
    try:
      yield
    finally:
      self.mark += compiling().total - before

  @contextlib.contextmanager
  def counted(self) -> Iterator[None]:
    """Counts all time inside as compilation, for what is done once, such as counting the flops of a step."""
    start = time.perf_counter()
    try:
      yield
    finally:
      compiling().add(start, time.perf_counter())

  def row(self) -> dict[str, Any]:
    """Returns the seconds of compilation and the peaks of memory so far."""
    total = compiling().total
    self.seconds, self.mark = self.seconds + total - self.mark, total
    return {'compilation_seconds': round(self.seconds, 4), **peak_memory(self.devices)}


def peak_memory(devices: Sequence[Any]) -> dict[str, int]:
  """Returns the most bytes in use so far: of this process, and of the fullest device if JAX reports it."""
  unit = 1 if sys.platform == 'darwin' else 1024
  peaks = {'host_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
  with contextlib.suppress(Exception):  # a backend may have no such statistics
    by_device = [(device.memory_stats() or {}).get('peak_bytes_in_use', 0) for device in devices]
    if max(by_device):
      peaks['device_peak_bytes'] = int(max(by_device))
  return peaks
