"""Charts as data, which the scripts of a page draw, and the rendering of pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from .. import jsonfile
from . import glossary

PAGES = Path(__file__).parent / 'pages'
MANY = 8  # the most lines that get a colour of their own
_POINTS = 300  # points of a line; more would be indistinguishable
_CELLS = 1500  # cells of a heatmap
_NAMES = 120  # rows of a heatmap
_LARGEST = 1e300  # the sum of larger numbers could overflow while a page scales them

Chart = dict[str, Any]
Points = Sequence[tuple[float, ...]]


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
  loader = jinja2.FileSystemLoader(PAGES)
  environment = jinja2.Environment(
    loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.globals['asset'] = _asset
  environment.filters['embedded'] = embedded
  environment.filters['term'] = glossary.explained
  return environment


def render(template: str, **values: Any) -> str:
  """Renders a page from a template in `pages`, and escapes text but not charts."""
  return _environment().get_template(template).render(**values)


def _asset(name: str) -> Markup:
  """Returns a script or a style sheet in `pages` as it is."""
  return Markup((PAGES / name).read_text(encoding='utf-8'))


def embedded(value: Any) -> Markup:
  """Returns a value as JSON for a script element of a page, which no text in it can end."""
  text = jsonfile.dumps(value, separators=(',', ':'), ensure_ascii=True)
  for sign in '<>&':  # JSON has them only in strings
    text = text.replace(sign, f'\\u{ord(sign):04x}')
  return Markup(text)


def lines(
  title: str,
  series: Mapping[str, Points],
  *,
  x: str = 'step',
  target: float | None = None,
  keys: Mapping[str, str] | None = None,
  log_x: bool = False,
  **more: Any,
) -> Chart | None:
  """Returns a chart of lines over a common x axis, or None if no line has a finite point.

  Args:
    title: the caption of the figure.
    series: name -> points (x, y), or (step, y, seconds). Points that are not finite are left out.
    x: what the x axis shows: 'step', 'seconds' or the name of a setting.
    target: the height of a dotted line.
    keys: name -> the key of the line's values in the rows of a run, by which the page finds the same line of another run.
    log_x: whether the x axis is logarithmic, if its range is wide enough.
    more: what the page's script takes besides: `dots`, the names of lines that are drawn as points only, and `scale`,
      the factor between the rows' values and the chart's.
  """
  kept = [_line(name, points, (keys or {}).get(name, '')) for name, points in series.items()]
  kept = [line for line in kept if line['points']]
  if not kept:
    return None
  xs = [point[0] for line in kept for point in line['points']]
  log_x = log_x and min(xs) > 0 and max(xs) / min(xs) > 20
  chart = {'kind': 'lines', 'title': title, 'x': x, 'lines': kept, 'log_x': log_x, **more}
  return chart if target is None else {**chart, 'target': target}


def _line(name: str, points: Points, key: str) -> dict[str, Any]:
  finite = [p for p in points if all(math.isfinite(v) and abs(v) < _LARGEST for v in p)]
  line: dict[str, Any] = {'name': name, 'points': [_rounded(p) for p in thinned(finite)]}
  if key:
    line['key'] = key
  if len(finite) > _POINTS:
    line['means'] = [_rounded(p, 5) for p in _means(finite)]
  return line


def _rounded(values: Sequence[float], digits: int = 6) -> list[float]:
  """Rounds numbers, as a chart shows few digits; whole numbers stay whole."""
  return [int(v) if float(v).is_integer() and abs(v) < 1e15 else float(f'{v:.{digits}g}') for v in values]


def thinned(points: Points, most: int = _POINTS) -> list[tuple[float, ...]]:
  """Returns the lowest and highest point of each stretch and both ends, so that no spike is lost."""
  if len(points) <= most:
    return list(points)
  kept = [points[0]]
  for part in np.array_split(np.asarray(points, float), most // 2):
    low, high = sorted((int(part[:, 1].argmin()), int(part[:, 1].argmax())))
    kept += [tuple(part[i]) for i in dict.fromkeys((low, high))]
  return [*kept, tuple(points[-1])]


def _means(points: Points) -> Float[np.ndarray, 'n k']:
  """Returns the mean of each stretch, from which a page smooths a line that has been thinned."""
  return np.stack([part.mean(0) for part in np.array_split(np.asarray(points, float), _POINTS // 2)])


def heatmap(title: str, series: Mapping[str, Mapping[int, float]]) -> Chart | None:
  """Returns a heatmap over names and steps, or None if it would be empty.

  It has about 1,500 cells, of three digits, and the 120 names with the largest values.

  series: name -> step -> value. Values that are not finite are left out.
  """
  finite = {
    name: {s: v for s, v in row.items() if math.isfinite(v) and abs(v) < _LARGEST} for name, row in series.items()
  }
  finite = {name: row for name, row in finite.items() if row}
  if not finite:
    return None
  largest = sorted(finite, key=lambda name: -max(finite[name].values()))[:_NAMES]
  names = [name for name in finite if name in set(largest)]
  steps = sorted({step for name in names for step in finite[name]})
  most = max(12, min(60, _CELLS // len(names)))
  steps = [*steps[:-1][:: 1 + len(steps) // most], steps[-1]]
  values = [[_rounded([finite[n][s]], 3)[0] if s in finite[n] else None for s in steps] for n in names]
  more = {'left_out': len(finite) - len(names)} if len(finite) > len(names) else {}
  return {'kind': 'heatmap', 'title': title, 'x': 'step', 'names': names, 'steps': steps, 'values': values, **more}


def by_layer(title: str, series: Mapping[str, Mapping[int, float]]) -> Chart | None:
  """Returns lines for a few layers, and a heatmap for more than eight."""
  if len(series) > MANY:
    return heatmap(title, series)
  return lines(title, {name: sorted(row.items()) for name, row in series.items()})


def numbered(charts: Sequence[Chart]) -> list[Chart]:
  """Gives the charts of a page the numbers by which its figures find them, and returns them."""
  for number, chart in enumerate(charts):
    chart['id'] = number
  return list(charts)


def short(value: float) -> str:
  """Formats a number in a few characters: 1.2M, 40k, 0.015, 3e-07."""
  if value == 0:
    return '0'
  size = abs(value)
  for limit, unit in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
    if size >= limit:
      return f'{value / {"G": 1e9, "M": 1e6, "k": 1e3}[unit]:.4g}{unit}'
  return f'{value:.4g}' if size >= 1e-3 else f'{value:.2g}'
