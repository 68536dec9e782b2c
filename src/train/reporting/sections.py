"""The parts of a run's page: cards, charts, times, layers and predictions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from . import clock as clocks
from .charts import Chart, by_layer, lines, short

Row = dict[str, Any]
_PICTURE = re.compile(r'data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+')
_PICTURES = 12
_CELLS_WITH_NUMBERS = 20  # the most classes of a confusion matrix whose cells show their counts


def cards(config: dict, about: dict, rows: list[Row], scores: list[Row], times: list[Row]) -> list[dict[str, str]]:
  """Returns the numbers on the cards at the top of the page."""
  found: list[tuple[str, str]] = []
  metric, lower = about.get('target_metric'), about.get('lower_is_better', True)
  key = f'eval_{metric}'
  scores = [row for row in scores if key in row]
  if scores:
    best = (min if lower else max)(scores, key=lambda row: row[key])
    found.append((f'{metric} at the end', f'{scores[-1][key]:.4g}'))
    found.append((f'best {metric}, step {best["step"]:,}', f'{best[key]:.4g}'))
    if config['target']:
      sign = 1 if lower else -1
      first = next((r for r in scores if sign * r[key] <= sign * config['target']), None)
      found.append((f'steps to {metric} {config["target"]:g}', f'{first["step"]:,}' if first else 'not reached'))
  losses = [row['loss'] for row in rows if 'loss' in row]
  if losses:
    found.append(('training loss, last step', f'{losses[-1]:.4g}'))
  rates = sorted(row['examples_per_second'] for row in times if 'examples_per_second' in row)
  if rates:
    found.append(('examples a second, median', short(rates[len(rates) // 2])))
  shares = sorted(row['mfu'] for row in times if 'mfu' in row)
  if shares:
    found.append(('of the peak flops (MFU)', f'{100 * shares[len(shares) // 2]:.1f} %'))
  peaks = [row['host_peak_bytes'] for row in times if 'host_peak_bytes' in row]
  if peaks:
    found.append(('peak memory of the host process', f'{max(peaks) / 1e9:.2f} GB'))
  if about.get('parameters'):
    found.append(('parameters', short(about['parameters'])))
  return [{'name': name, 'value': value} for name, value in found]


def learning(config: dict, about: dict, rows: list[Row], scores: list[Row], times: list[Row]) -> list[Chart]:
  """Returns the charts of losses, scores, speed, the optimiser's numbers and memory."""
  metric = about.get('target_metric')
  plain = [k.removeprefix('eval_') for k in dict.fromkeys(k for row in scores for k in row) if k.startswith('eval_')]
  charts = []
  for name in dict.fromkeys(['loss', *plain]):
    target = config['target'] if name == metric and config['target'] else None
    series = {'training': of(rows, name), 'evaluation': of(scores, f'eval_{name}')}
    charts.append(lines(name, series, keys={'training': name, 'evaluation': f'eval_{name}'}, target=target))
  charts.append(_one('examples a second', 'rate', 'examples_per_second', times))
  for name in ('clip', 'damping', 'learning_rate', 'loss_scale'):
    charts.append(_one(name.replace('_', ' '), name.replace('_', ' '), name, rows))
  charts.append(_memory(times))
  return [c for c in charts if c is not None]


def of(rows: Sequence[Row], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
  """Returns the points (step, value) of the rows that have a key."""
  return [(row['step'], scale * row[key]) for row in rows if key in row]


def _one(title: str, name: str, key: str, rows: list[Row]) -> Chart | None:
  return lines(title, {name: of(rows, key)}, keys={name: key})


def _memory(times: list[Row]) -> Chart | None:
  keys = {'host process': 'host_peak_bytes', 'fullest device': 'device_peak_bytes'}
  series = {name: of(times, key, 1e-9) for name, key in keys.items()}
  return lines('peak memory (GB)', series, keys=keys, scale=1e-9)


def times_of_parts(times: list[Row], whole: bool) -> list[dict[str, Any]]:
  """Returns the seconds and the share of each part of the run.

  whole: whether 'compute' includes compilation.
  """
  parts = clocks.spent(times)
  total = sum(parts.values()) or 1.0
  words = lambda name: 'compute, with compilation' if whole and name == 'compute' else name  # noqa: E731
  order = ('input', 'compute', 'compilation', 'evaluation', 'checkpoint')
  ordered = dict.fromkeys([*(k for k in order if k in parts), *parts])
  return [
    {'name': words(k), 'seconds': f'{parts[k]:,.1f} s', 'share': f'{100 * parts[k] / total:.1f}'} for k in ordered
  ]


def health(layers: list[Row]) -> list[Chart]:
  """Returns a chart for each quantity of the layers."""
  keys = dict.fromkeys(k for row in layers for numbers in row['layers'].values() for k in numbers)
  charts = []
  for key in keys:
    if key == 'refresh_interval' or key.startswith('largest'):
      continue
    series: dict[str, dict[int, float]] = {}
    for row in layers:
      for name, numbers in row['layers'].items():
        if key in numbers:
          series.setdefault(name, {})[row['step']] = numbers[key]
    charts.append(by_layer(key.replace('_', ' '), series))
  return [c for c in charts if c is not None]


def number_cell(value: float) -> dict[str, str]:
  """Returns a cell of a table that sorts as a number: its text, and its value where the text has a unit."""
  text = short(value)
  return {'text': text, 'value': f'{value:.6g}'} if text[-1].isalpha() else {'text': text}


def layer_table(layers: list[Row]) -> dict[str, Any]:
  """Returns the numbers of every layer at the last step that has them."""
  if not layers:
    return {'rows': []}
  last = layers[-1]
  keys = list(dict.fromkeys(k for numbers in last['layers'].values() for k in numbers))
  cell = lambda numbers, k: number_cell(numbers[k]) if k in numbers else {'text': ''}  # noqa: E731
  rows = [[{'text': name}, *(cell(numbers, k) for k in keys)] for name, numbers in last['layers'].items()]
  return {'step': f'{last["step"]:,}', 'head': ['layer', *(k.replace('_', ' ') for k in keys)], 'rows': rows}


def predictions(found: Any) -> dict[str, Any]:
  """Returns what the page shows of `predictions.json`, without anything that is not as a run writes it."""
  shown: dict[str, Any] = {'skipped': '', 'pairs': [], 'classes': 0, 'examples': [], 'matrix': None, 'words': ''}
  if not isinstance(found, dict):
    return shown
  if isinstance(found.get('skipped'), str):
    return {**shown, 'skipped': found['skipped'][:400]}
  listed = found['pictures'] if isinstance(found.get('pictures'), list) else []
  pictures = [p for p in listed if isinstance(p, dict) and _is_picture(p.get('image'))][:_PICTURES]
  if found.get('task') == 'reconstruct':
    return {**shown, 'pairs': [p for p in pictures if _is_picture(p.get('made'))]}
  classes = found.get('classes')
  if not _is_whole(classes, 10**7) or not classes:
    return shown
  names = _names(found.get('names'), classes)
  count, right = found.get('examples'), found.get('right')
  if _is_whole(count, 10**9) and _is_whole(right, 10**9) and right <= count:
    shown['words'] = f'{right:,} of {count:,} examples of the evaluation set are classified correctly.'
  matrix = _confusion(found.get('matrix'), classes, names)
  return {**shown, 'classes': classes, 'matrix': matrix, 'examples': _examples(pictures, classes, names)}


def _examples(pictures: list[dict[str, Any]], classes: int, names: list[str]) -> list[dict[str, Any]]:
  """Returns the classified examples that are whole, with the names of their classes."""
  of_class = lambda k: names[k] if names else str(k)  # noqa: E731
  return [
    {
      'image': p['image'],
      'label': of_class(p['label']),
      'prediction': of_class(p['prediction']),
      'right': p['label'] == p['prediction'],
      'probability': f'{100 * p["probability"]:.0f}\u00a0%',
    }
    for p in pictures
    if all(_is_whole(p.get(k), classes) for k in ('label', 'prediction')) and _is_share(p.get('probability'))
  ]


def _is_picture(value: Any) -> bool:
  return isinstance(value, str) and len(value) < 2**20 and _PICTURE.fullmatch(value) is not None


def _is_whole(value: Any, end: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_share(value: Any) -> bool:
  return isinstance(value, int | float) and 0 <= value <= 1


def _names(names: Any, classes: int) -> list[str]:
  good = isinstance(names, list) and len(names) == classes and all(isinstance(n, str) for n in names)
  return [n[:80] for n in names] if good else []


def _confusion(matrix: Any, classes: int, names: list[str]) -> Chart | None:
  """Returns the chart of a confusion matrix, or None if there is no valid one."""
  if not isinstance(matrix, list) or len(matrix) != classes or classes > 100:
    return None
  for row in matrix:
    if not isinstance(row, list) or len(row) != classes or not all(_is_whole(n, 10**9) for n in row):
      return None
  if not any(map(any, matrix)):
    return None
  names = names or [str(k) for k in range(classes)]
  numbered = classes <= _CELLS_WITH_NUMBERS
  return {'kind': 'confusion', 'title': 'confusion matrix', 'names': names, 'matrix': matrix, 'numbered': numbered}
