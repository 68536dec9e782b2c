"""A table and a page that compare the members of a sweep."""

from __future__ import annotations

import collections
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import files
from ..registry import TASKS
from ..reporting.charts import chart, render, short
from ..reporting.tables import columns
from ..runtime.workdir import read_rows
from ..settings.overrides import Overrides, apply


class Member(NamedTuple):
  """A run of a sweep. state: 'waits', 'runs', 'done', 'failed' or 'stopped'; words: why it failed."""

  name: str
  overrides: Overrides
  workdir: str
  state: str = 'waits'
  words: str = ''


class Outcome(NamedTuple):
  """The results of one member. reached: the first evaluated step at the target. curve: (step, seconds, metric)."""

  member: Member
  last: float | None
  best: float | None
  reached: int | None
  rate: float | None
  curve: list[tuple[int, float, float]]


def outcome(member: Member, config: Any) -> Outcome:
  """Reads the results of a member from its folder."""
  variant_config, workdir = apply(config, member.overrides), Path(member.workdir)
  entry = TASKS[variant_config.task]
  metric, lower = entry.target, entry.lower_is_better
  key, sign = f'eval_{metric}', 1 if lower else -1
  rows = read_rows(workdir / 'metrics.jsonl')
  curve = [(row['step'], row['seconds'], row[key]) for row in rows if 'seconds' in row and key in row]
  rates = [row['examples_per_second'] for row in rows if 'examples_per_second' in row]
  values = [value for _, _, value in curve]
  reached = next(
    (step for step, _, value in curve if variant_config.target and sign * value <= sign * variant_config.target), None
  )
  best = sign * min(sign * v for v in values) if values else None
  return Outcome(
    member, values[-1] if values else None, best, reached, statistics.median(rates) if rates else None, curve
  )


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
  states = collections.Counter(m.state for m in members)
  best = outcomes[0] if outcomes and outcomes[0].best is not None else None
  cards = [('members', str(len(members))), *((s, str(n)) for s, n in states.items())]
  if best is not None:
    cards += [(f'best {metric}: {best.member.name}', f'{best.best:.4g}')]
  lines = {o.member.name: o for o in outcomes if o.curve}
  target = config.target or None
  many = len(lines) > 8
  charts = [
    chart(metric, {n: [(s, v) for s, _, v in o.curve] for n, o in lines.items()}, target=target, faint=many),
    chart(
      metric, {n: [(t, v) for _, t, v in o.curve] for n, o in lines.items()}, x='seconds', target=target, faint=many
    ),
    *_by_setting(outcomes, keys, metric),
  ]
  page = render(
    'sweep.html',
    title=f'{config.optimizer} on {config.data.name}: {len(members)} settings',
    subtitle=f'{config.model.name}, batch {config.data.batch_size}, {config.steps} steps, {workdir}',
    cards=[{'name': name, 'value': value} for name, value in cards],
    charts=[c for c in charts if c],
    head=['member', *head],
    rows=[
      {'cells': [o.member.name, *row], 'link': _link(workdir, o.member)} for o, row in zip(outcomes, rows, strict=True)
    ],
  )
  files.write(workdir / 'sweep.html', page)
  return text


def _row(o: Outcome, keys: Sequence[str]) -> list[str]:
  number = lambda v: '-' if v is None else f'{v:.4g}'  # noqa: E731
  settings = [str(o.member.overrides.get(k, '')) for k in keys]
  reached = '-' if o.reached is None else str(o.reached)
  return [*settings, o.member.state, number(o.best), number(o.last), reached, '-' if o.rate is None else short(o.rate)]


def _link(workdir: Path, member: Member) -> str:
  report = Path(member.workdir) / 'report.html'
  return os.path.relpath(report, workdir) if report.exists() else ''


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


def _by_setting(outcomes: Sequence[Outcome], keys: Sequence[str], metric: str) -> list[Any]:
  """Draws a chart for each numeric setting: the median of the best values over all other settings."""
  charts = []
  for key in keys:
    numbers = {o.member.overrides.get(key) for o in outcomes}
    if key == 'seed' or len(numbers) < 3 or not all(isinstance(n, int | float) for n in numbers):
      continue
    points = sorted((float(k), statistics.median(v)) for (k,), v in _groups(outcomes, [key]).items())
    charts.append(chart(f'best {metric}', {key: points}, x=key, log_x=True))
  return charts
