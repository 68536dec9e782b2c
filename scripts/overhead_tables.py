"""The tables of `overhead.py`, made from its measurements."""

from __future__ import annotations

import statistics
from typing import Any

from kronmesh.train.reporting.tables import columns
from kronmesh.train.runtime.machine import Machine

BOUNDS = ('least', 'flops', 'bytes')


def summary(times: dict[str, list[float]], length: int) -> dict[str, dict[str, float]]:
  """Returns each member's step times, and their ratios to SGD's and AdamW's.

  The ratios are medians over intervals of `length` steps, each against SGD or AdamW in the same interval. Their steps
  are all of one kind, so their median stands for them: an outlier among them would flatter the other members.
  """
  names = list(times)
  result = {}
  blocks = [slice(i, i + length) for i in range(0, len(times[names[0]]), length)]
  for name, seconds in times.items():
    over = lambda other, seconds=seconds: statistics.median(  # noqa: E731
      statistics.fmean(seconds[b]) / statistics.median(times[other][b]) for b in blocks
    )
    median = statistics.median(seconds)
    # For each position in an interval, the median over intervals: the worst kind of step, not the worst outlier.
    turns = [statistics.median(seconds[i::length]) for i in range(length)]
    result[name] = {
      'median': median,
      'mean': statistics.fmean(seconds),
      'worst': max(turns),
      'worst seen': max(seconds),
    }
    result[name] |= {f'mean over {other}': over(other) for other in names[:2]}
  return result


def report(result: dict[str, Any]) -> str:
  """Formats the tables for the contents of OUT.json."""
  here = Machine(**result['device'])
  tables = programs_table(result['programs'])
  return '\n\n'.join([*steps_tables(result, here), *tables] if 'steps' in result else tables)


def programs_table(programs: dict[str, Any]) -> list[str]:
  sgd = programs['sgd']['step']
  rows = []
  for name, program in programs.items():
    for kind, p in program.items():
      if not kind.startswith('inverses'):
        rows.append([name, kind, *(p[k] / sgd[k] for k in ('seconds', 'memory', 'flops', 'bytes'))])
    small = [p for kind, p in program.items() if kind.startswith('inverses')]
    for kind, some in ((f'inverses, {len(small)} programs', small), ('all', list(program.values()))):
      if some:
        together = sum(p['seconds'] for p in some) / sgd['seconds'], max(p['memory'] for p in some) / sgd['memory']
        rows.append([name, kind, *together, '-', '-'])
  head = ['member', 'program', 'compile', 'memory', 'flops', 'bytes']
  title = "Programs, as multiples of SGD's: tracing and compiling, peak memory, and flops and bytes as XLA counts them"
  return [title, columns(head, rows)]


def steps_tables(result: dict[str, Any], here: Machine) -> list[str]:
  steps = result['steps']
  base = steps['sgd']['median']
  others = [name for name in steps if name != 'sgd'][:1]
  head = ['member', 'median', 'mean', 'worst', 'worst / median', 'mean over SGD', f'mean over {others[0]}']
  rows = [
    [name, s['median'] / base, s['mean'] / base, s['worst'] / base, s['worst'] / s['median']]
    + [s[f'mean over {other}'] for other in ('sgd', *others)]
    for name, s in steps.items()
  ]
  tables = [f"{here.name}: steps, in SGD's median step", columns(head, rows)]
  if here.timed:
    tables += ['milliseconds', columns(
      ['member', 'median', 'mean', 'worst'],
      [[name, *(1e3 * s[k] for k in ('median', 'mean', 'worst'))] for name, s in steps.items()],
    )]  # fmt: skip
  for name, part_times in result['parts'].items():
    rows = []
    for part, seconds in part_times.items():
      least = result['floors'][name].get(part)
      rows.append([part, f'{seconds / base:.4f}', *(f'{least[k] / base:.4f}' if least else '-' for k in BOUNDS)])
    tables += [f'{name}: parts of a mean step and their floors, in SGD\'s median step ({here.peaks})',
               columns(['part', 'takes', 'floor', 'by flops', 'by bytes'], rows)]  # fmt: skip
  return tables
