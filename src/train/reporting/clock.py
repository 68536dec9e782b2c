"""Seconds of training by step, and where the time of a run went, from its rows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Clock(NamedTuple):
  """The seconds of training (waiting for data, and steps) at the end of some steps.

  whole: whether the seconds include compilation, because some rows do not say how long it took.
  """

  steps: list[float]
  seconds: list[float]
  whole: bool

  def at(self, step: float) -> float:
    """Returns the seconds at a step, on a straight line between the steps that are known."""
    if not self.steps:
      return float('nan')
    right = min(max(1, bisect.bisect_left(self.steps, step)), len(self.steps) - 1)
    if right == 0:
      return self.seconds[0]
    (a, b), (s, t) = self.steps[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
    return s + (t - s) * min(1.0, max(0.0, (step - a) / (b - a)))


def starts(rows: Sequence[Row]) -> list[list[Row]]:
  """Divides the rows with times by the starts of the run: seconds are counted anew from each start."""
  parts: list[list[Row]] = []
  for row in rows:
    if not parts or row['compute_seconds'] < parts[-1][-1]['compute_seconds']:
      parts.append([])
    parts[-1].append(row)
  return parts


def clock(rows: Sequence[Row]) -> Clock:
  """Returns the clock of a run, from its rows with times; steps that were taken twice count once."""
  whole = any('compilation_seconds' not in row for row in rows)
  steps, seconds, base = [0.0], [0.0], 0.0
  for part in starts(rows):
    for row in part:
      spent = row['compute_seconds'] + row.get('input_seconds', 0.0)
      spent = base + max(0.0, spent - (0.0 if whole else row['compilation_seconds']))
      while len(steps) > 1 and steps[-1] >= row['step']:
        steps.pop(), seconds.pop()
      if row['step'] > 0:
        steps.append(row['step'])
        seconds.append(max(spent, seconds[-1]))
    base = seconds[-1]
  return Clock(steps, seconds, whole) if len(steps) > 1 else Clock([], [], whole)


def spent(rows: Sequence[Row]) -> dict[str, float]:
  """Returns the seconds of each part of a run, over all its starts; compilation is taken out of 'compute'."""
  total: dict[str, float] = {}
  for part in starts(rows):
    for key, value in part[-1].items():
      if key.endswith('_seconds') and isinstance(value, int | float) and 0 <= value < 1e12:
        name = key.removesuffix('_seconds')
        total[name] = total.get(name, 0.0) + value
  if 'compute' in total and 'compilation' in total:
    total['compilation'] = min(total['compilation'], total['compute'])
    total['compute'] -= total['compilation']
  return total
