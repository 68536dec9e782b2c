"""The rows that a window needs as it slides along an axis: pure functions of sizes, for convolutions and pooling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .halo import Strip


class Window(NamedTuple):
  """A window along one axis: its size, stride, padding at both ends, and the dilations of the input and the window."""

  size: int
  stride: int = 1
  low: int = 0
  high: int = 0
  base: int = 1
  dilation: int = 1

  @property
  def extent(self) -> int:
    """Returns the distance from the first entry to the last, both included."""
    return (self.size - 1) * self.dilation + 1

  def places(self, length: int) -> int:
    """Returns the length of the result."""
    dilated = max(length - 1, 0) * self.base + (length > 0)
    return max((dilated + self.low + self.high - self.extent) // self.stride + 1, 0)


class Need(NamedTuple):
  """The rows of an axis that the devices need for their strips `out` of the result.

  first: the first row that device i needs; it needs counts[i] rows from there.
  phases: with a dilated input, the number of zeros before its first row.
  span: the length of the dilated part under the windows.
  """

  out: Strip
  first: tuple[int, ...]
  counts: tuple[int, ...]
  phases: tuple[int, ...]
  span: int


def need(window: Window, strip: Strip) -> Need:
  out = strip.of(window.places(strip.size))
  starts = out.firsts * window.stride - window.low
  span = (out.rows - 1) * window.stride + window.extent if out.rows else 0
  first = -(-starts // window.base)
  phases = first * window.base - starts
  last = (starts + (out.counts - 1) * window.stride + window.extent - 1) // window.base
  counts = np.where(out.counts, np.maximum(last - first + 1, 0), 0)
  return Need(out, tuple(first.tolist()), tuple(counts.tolist()), tuple(phases.tolist()), span)
