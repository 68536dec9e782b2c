"""Line charts as SVG, for pages that need only a browser."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from .. import jsonfile

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_POINTS = 300  # points of a line; more would be indistinguishable
COLOURS = 8

Series = Mapping[str, Sequence[tuple[float, float]]]


def render(template: str, **values: Any) -> str:
  """Renders a page from a template in `pages`, and escapes text but not charts."""
  loader = jinja2.FileSystemLoader(Path(__file__).parent / 'pages')
  environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  return environment.get_template(template).render(**values)


def chart(
  title: str, series: Series, *, x: str = 'step', target: float | None = None, faint: bool = False, log_x: bool = False
) -> Markup:
  """Draws lines over a common x axis, or returns '' if no line has a finite point.

  Args:
    title: the caption of the figure.
    series: name -> points (x, y); points that are not finite are left out.
    x: the name of the x axis.
    target: the height of a dotted line.
    faint: whether to draw thin lines without a legend, for many lines.
    log_x: whether the x axis may be logarithmic, if its range is wide enough.
  """
  finite = lambda points: [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]  # noqa: E731
  kept = {name: thinned for name, points in series.items() if (thinned := _thinned(finite(points)))}
  if not kept:
    return Markup('')
  xs = [a for points in kept.values() for a, _ in points]
  ys = [b for points in kept.values() for _, b in points] + ([] if target is None else [target])
  log = min(ys) > 0 and max(ys) / min(ys) > 20
  log_x = log_x and min(xs) > 0 and max(xs) / min(xs) > 20
  to_x = _scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, log_x)
  low, high = (min(ys), max(ys)) if log else _padded(min(ys), max(ys))
  to_y = _scale(low, high, HEIGHT - _BOTTOM, _TOP, log)
  parts = []
  for tick in ticks(low, high, log):
    at = to_y(tick)
    parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>')
  for tick in ticks(min(xs), max(xs), log_x):
    parts.append(f'<text x="{to_x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>')
  if target is not None:
    at = to_y(target)
    parts.append(f'<line class="target" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
  data = {'width': WIDTH, 'x': x, 'series': []}
  for i, (name, points) in enumerate(kept.items()):
    places = [(to_x(a), to_y(b)) for a, b in points]
    colour = f'style="stroke:var(--c{i % COLOURS})"'
    if len(places) == 1:
      (a, b) = places[0]
      parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" style="fill:var(--c{i % COLOURS})"/>')
    else:
      path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in places)
      parts.append(f'<polyline class="line{" faint" if faint else ""}" {colour} points="{path}"/>')
    values = [[short(p[0]), f'{p[1]:.4g}', round(at[0], 1)] for p, at in zip(points, places, strict=True)]
    data['series'].append({'name': name, 'points': values})
  parts.append(f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
  legend = ''
  if len(kept) > 1 and not faint:
    items = (
      f'<span><i style="background:var(--c{i % COLOURS})"></i>{html.escape(n)}</span>' for i, n in enumerate(kept)
    )
    legend = f'<div class="legend">{"".join(items)}</div>'
  more = ', logarithmic' if log else ''
  label = html.escape(f'{title} over {x}{more}')
  return Markup(
    f'<figure data-points="{html.escape(jsonfile.dumps(data))}"><figcaption>{html.escape(title)} '
    f'<small>over {html.escape(x)}{more}</small></figcaption>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    f'{legend}<div class="tip"></div></figure>'
  )


def _padded(low: float, high: float) -> tuple[float, float]:
  pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
  return low - pad, high + pad


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Any:
  to = math.log10 if log else float
  span = to(high) - to(low) or 1.0
  return lambda v: start + (to(v) - to(low)) / span * (end - start)


def ticks(low: float, high: float, log: bool) -> list[float]:
  """Returns at most seven round numbers between two numbers."""
  if high <= low:
    return [low]
  if log:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 6))
    powers = [10.0**e for e in range(first, last + 1, every)]
    if len(powers) > 2:
      return powers
    return [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
  step = 10 ** math.floor(math.log10((high - low) / 4))
  step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
  return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
  """Formats a number in a few characters: 1.2M, 40k, 0.015, 3e-07."""
  if value == 0:
    return '0'
  size = abs(value)
  for limit, unit in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
    if size >= limit:
      return f'{value / {"G": 1e9, "M": 1e6, "k": 1e3}[unit]:.4g}{unit}'
  return f'{value:.4g}' if size >= 1e-3 else f'{value:.2g}'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Returns the lowest and highest point of each stretch and both ends, so that no spike is lost."""
  if len(points) <= _POINTS:
    return list(points)
  kept = [points[0]]
  for part in np.array_split(np.asarray(points, float), _POINTS // 2):
    low, high = sorted((int(part[:, 1].argmin()), int(part[:, 1].argmax())))
    kept += [tuple(part[i]) for i in dict.fromkeys((low, high))]
  return [*kept, tuple(points[-1])]
