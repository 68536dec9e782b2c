"""Traces of selected steps for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from ..errors import ConfigError


class Profile:
  """A profiler that traces everything between `before(first)` and `before(last + 1)`.

  Args:
    steps: 'FIRST:LAST', counted from 0, or None to trace nothing.
    count: the number of steps of the run.
    folder: the folder for the traces.

  Raises:
    ConfigError: `steps` is not such a pair, or the run has fewer steps.
  """

  def __init__(self, steps: str | None, folder: Path, count: int):
    match = re.fullmatch(r'(\d+):(\d+)', steps or '0:0')
    if match is None or int(match[1]) > int(match[2]):
      raise ConfigError(f'--profile={steps} must be FIRST:LAST, two steps: --profile=10:15')
    if steps and int(match[1]) >= count:
      raise ConfigError(f'--profile={steps}: the run has {count} steps, which are counted from 0')
    self.first, self.last = (int(match[1]), int(match[2])) if steps else (-1, -1)
    self.folder, self.running = folder, False

  def before(self, step: int, state: Any) -> None:
    if step == self.first and not self.running:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self.folder)
      self.running = True
    elif self.running and step > self.last:
      jax.block_until_ready(state)
      self._stop()

  def _stop(self) -> None:
    self.running = False
    jax.profiler.stop_trace()

  def __enter__(self) -> Profile:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self.running:
      self._stop()
