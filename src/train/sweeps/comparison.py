"""A table and a page that compare the members of a sweep."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import files
from .. import jsonfile
from ..registry import TASKS
from ..reporting import clock as clocks
from ..reporting.charts import Chart, lines, numbered, render, short, thinned
from ..reporting.tables import columns
from ..settings.overrides import Overrides, apply

_LARGEST = 2**30  # bytes of a file of rows
_POINTS = 12_000  # points of all curves together
_AXES = 8  # settings in parallel coordinates
_WITHOUT = 'Seconds are those of training: input and compute, without compilation and evaluation.'
_WHOLE = 'Seconds are those of training. They include compilation, as some rows do not say how long it took.'


class Member(NamedTuple):
  """A run of a sweep. state: 'waits', 'runs', 'done', 'failed' or 'stopped'; words: why it failed."""

  name: str
  overrides: Overrides
  workdir: str
  state: str = 'waits'
  words: str = ''


class Outcome(NamedTuple):
  """The results of one member.

  reached: the first evaluated step at the target. curve: (step, metric, seconds of training).
  whole: whether the seconds include compilation.
  """

  member: Member
  last: float | None
  best: float | None
  reached: int | None
  rate: float | None
  curve: list[tuple[float, float, float]]
  whole: bool = False


def outcome(member: Member, config: Any) -> Outcome:
  """Reads the results of a member from its folder."""
  variant_config, workdir = apply(config, member.overrides), Path(member.workdir)
  entry = TASKS[variant_config.task]
  metric, lower = entry.target, entry.lower_is_better
  key, sign = f'eval_{metric}', 1 if lower else -1
  rows = _rows(workdir / 'metrics.jsonl')
  clock = clocks.clock([row for row in rows if 'compute_seconds' in row])
  scores = [row for row in rows if 'seconds' in row and key in row]
  curve = [(row['step'], row[key], clock.at(row['step']) if clock.steps else row['seconds']) for row in scores]
  rates = [row['examples_per_second'] for row in rows if 'examples_per_second' in row]
  values = [value for _, value, _ in curve]
  reached = next(
    (step for step, value, _ in curve if variant_config.target and sign * value <= sign * variant_config.target), None
  )
  best = sign * min(sign * v for v in values) if values else None
  rate = statistics.median(rates) if rates else None
  whole = clock.whole or not clock.steps
  return Outcome(member, values[-1] if values else None, best, reached, rate, curve, whole)


def _rows(path: Path) -> list[dict[str, Any]]:
  """Reads the numbers of the rows that have seconds; those of single steps, which are most, are not decoded."""
  try:
    lines_read = files.read(path, _LARGEST).splitlines()
  except (OSError, ValueError):
    return []
  rows = []
  for line in lines_read:
    if b'seconds"' not in line:
      continue
    with contextlib.suppress(ValueError):
      row = jsonfile.read_row(line.decode())
      if isinstance(row, dict) and isinstance(row.get('step'), int | float):
        rows.append({k: v for k, v in row.items() if isinstance(v, int | float) and abs(v) < 1e300})
  return [row for row in rows if 'step' in row]


class Known:
  """A cache of members' outcomes, which reads a member's file again only if it has changed."""

  def __init__(self):
    self._found: dict[str, tuple[Any, Outcome]] = {}

  def outcome(self, member: Member, config: Any) -> Outcome:
    try:
      stat = (Path(member.workdir) / 'metrics.jsonl').stat()
      mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError:
      mark = None
    before, earlier = self._found.get(member.name, (None, None))
    if earlier is None or before != mark:
      earlier = outcome(member, config)
      self._found[member.name] = mark, earlier
    return earlier._replace(member=member)


def write_comparison(workdir: Path, config: Any, members: Sequence[Member], known: Known | None = None) -> str:
  """Writes `table.txt` and `sweep.html`, with the best member first, and returns the table.

  known: a cache of the outcomes that earlier calls have read.
  """
  _, metric, lower, *_ = TASKS[config.task]
  known = Known() if known is None else known
  outcomes = [known.outcome(member, config) for member in members]
  order = lambda o: (o.best is None, (1 if lower else -1) * (o.best or 0))  # noqa: E731
  outcomes.sort(key=order)
  keys = list(dict.fromkeys(k for m in members for k in m.overrides))
  keys = [k for k in keys if len({repr(m.overrides.get(k)) for m in members}) > 1] or keys
  head = [*keys, 'state', f'best {metric}', f'last {metric}', f'steps to {config.target:g}', 'examples/s']
  rows = [_row(o, keys) for o in outcomes]
  text = columns(head, rows)
  over_seeds = _over_seeds(outcomes, keys, metric, lower) if 'seed' in keys and len(keys) > 1 else ''
  failed = [f'{o.member.name}: {o.member.words}' for o in outcomes if o.member.state == 'failed']
  text = '\n\n'.join(filter(None, [text, over_seeds, '\n'.join(failed)]))
  files.write(workdir / 'table.txt', text + '\n')
  best = outcomes[0] if outcomes and outcomes[0].best is not None else None
  states = collections.Counter(m.state for m in members)
  cards = [('members', str(len(members))), *((s, str(n)) for s, n in states.items())]
  if best is not None:
    cards += [(f'best {metric}: {best.member.name}', f'{best.best:.4g}')]
  charts = [*_curves(outcomes, metric, config.target or None), *_by_setting(outcomes, keys, metric)]
  parallel = _parallel(outcomes, keys, metric, lower)
  whole = any(o.whole for o in outcomes if o.curve)
  page = render(
    'sweep.html',
    title=f'{config.optimizer} on {config.data.name}: {len(members)} settings',
    subtitle=f'{config.model.name}, batch {config.data.batch_size}, {config.steps} steps, {workdir}',
    cards=[{'name': name, 'value': value} for name, value in cards],
    charts=charts,
    note=_WHOLE if whole else _WITHOUT,
    parallel=parallel,
    head=['member', *head],
    rows=[_cells(workdir, o, keys) for o in outcomes],
    data={
      'name': workdir.name,
      'running': False,
      'clock': [],
      'compiles': whole,
      'charts': numbered([*charts, *([parallel] if parallel else [])]),
    },
  )
  files.write(workdir / 'sweep.html', page)
  return text


def _row(o: Outcome, keys: Sequence[str]) -> list[str]:
  number = lambda v: '-' if v is None else f'{v:.4g}'  # noqa: E731
  settings = [str(o.member.overrides.get(k, '')) for k in keys]
  reached = '-' if o.reached is None else str(o.reached)
  return [*settings, o.member.state, number(o.best), number(o.last), reached, '-' if o.rate is None else short(o.rate)]


def _cells(workdir: Path, o: Outcome, keys: Sequence[str]) -> list[dict[str, Any]]:
  """Returns a member's row of the page's table: texts, the numbers by which they sort, and the link to its report."""
  numbers = [*(o.member.overrides.get(k) for k in keys), None, o.best, o.last, o.reached, o.rate]
  cells: list[dict[str, Any]] = [{'text': o.member.name}]
  report = Path(o.member.workdir) / 'report.html'
  if report.exists():
    cells[0]['link'] = os.path.relpath(report, workdir)
  for text, value in zip(_row(o, keys), numbers, strict=True):
    cells.append({'text': text, 'value': value} if _is_number(value) else {'text': text})
  return cells


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _curves(outcomes: Sequence[Outcome], metric: str, target: float | None) -> list[Chart]:
  """Returns the charts of all members over steps and over seconds, the best member first."""
  shown = [o for o in outcomes if o.curve]
  most = max(24, _POINTS // max(1, len(shown)))
  series = {o.member.name: thinned(o.curve, most) for o in shown}
  steps = lines(metric, series, target=target)
  if steps is None:
    return []
  return [steps, {**steps, 'x': 'seconds', 'lines': [], 'like': 0}]  # the lines of the first chart, with another x


def _groups(outcomes: Sequence[Outcome], keys: Sequence[str]) -> dict[tuple[str, ...], list[float]]:
  """Groups the best values by the settings of these keys."""
  groups: dict[tuple[str, ...], list[float]] = {}
  for o in outcomes:
    if o.best is not None:
      groups.setdefault(tuple(str(o.member.overrides.get(k, '')) for k in keys), []).append(o.best)
  return groups


def _over_seeds(outcomes: Sequence[Outcome], keys: Sequence[str], metric: str, lower: bool) -> str:
  others = [k for k in keys if k != 'seed']
  groups = _groups(outcomes, others)
  order = sorted(groups, key=lambda g: (1 if lower else -1) * statistics.median(groups[g]))
  rows = [
    [*g, str(len(v)), f'{statistics.median(v):.4g}', f'{min(v):.4g} to {max(v):.4g}']
    for g, v in ((g, groups[g]) for g in order)
  ]
  return columns([*others, 'seeds', f'median best {metric}', 'range'], rows)


def _by_setting(outcomes: Sequence[Outcome], keys: Sequence[str], metric: str) -> list[Chart]:
  """Returns a chart for each numeric setting: the best value of each member, and the median over all other settings."""
  charts = []
  for key in keys:
    numbers = {o.member.overrides.get(key) for o in outcomes}
    if key == 'seed' or len(numbers) < 3 or not all(map(_is_number, numbers)):
      continue
    median = sorted((float(k), statistics.median(v)) for (k,), v in _groups(outcomes, [key]).items())
    members = sorted((float(o.member.overrides[key]), o.best) for o in outcomes if o.best is not None)
    series = {'median': median, 'members': members}
    charts.append(lines(f'best {metric} by {key}', series, x=key, log_x=True, dots=['members']))
  return [c for c in charts if c is not None]


def _parallel(outcomes: Sequence[Outcome], keys: Sequence[str], metric: str, lower: bool) -> Chart | None:
  """Returns the parallel coordinates of the settings that differ and of the best value; None for less than two members."""
  shown = [o for o in outcomes if o.best is not None and math.isfinite(o.best)]
  used = [k for k in keys if k != 'seed' or len(keys) == 1]
  used = [k for k in used if len({repr(o.member.overrides.get(k)) for o in shown}) > 1][:_AXES]
  if len(shown) < 2 or not used:
    return None
  axes, columns_of = [], []
  for name, values in (*((k, [o.member.overrides.get(k) for o in shown]) for k in used), (f'best {metric}', None)):
    values = [o.best for o in shown] if values is None else values
    axis, column = _axis(name, values)
    axes.append(axis)
    columns_of.append(column)
  members = [
    {'name': o.member.name, 'values': list(row)} for o, row in zip(shown, zip(*columns_of, strict=True), strict=True)
  ]
  return {'kind': 'parallel', 'title': 'parallel coordinates', 'axes': axes, 'members': members, 'lower': lower}


def _axis(name: str, values: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
  """Returns an axis and the places of values on it: numbers, or the numbers of their words; None for no value."""
  there = [v for v in values if v is not None]
  if all(map(_is_number, there)):
    log = min(there) > 0 and max(there) / min(there) > 20
    return {'name': name, 'log': log, 'names': None}, list(values)
  words = list(dict.fromkeys(map(str, there)))
  return {'name': name, 'log': False, 'names': words}, [None if v is None else words.index(str(v)) for v in values]
