"""Plain-text tables, which the scripts print and the pages show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats


def columns(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Formats left-aligned columns under their headings, with floats to two decimals."""
  cells = [list(head), *[[f'{c:.2f}' if isinstance(c, float) else str(c) for c in row] for row in rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
  lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def interval(values: Float[np.ndarray, ' n']) -> str:
  """Formats the mean of at least two values and its 95 % interval by Student's t, in percent."""
  half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
  return f'{100 * values.mean():.1f} +- {100 * half:.1f}'
