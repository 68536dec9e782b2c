"""A page about one run: curves, layers, events, devices and config. It needs only a browser."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ... import files
from .. import jsonfile
from ..errors import ConfigError
from ..runtime.workdir import as_json, read_rows
from ..settings.defaults import defaults
from .charts import chart, render, short

_MANY = 8  # the most lines of layers that get a legend
_NAME = 'report.html'
_ROWS = 300  # rows of layers that charts use
_LARGEST = 2**24  # the most bytes of a picture in the page


def write_report(workdir: Path) -> Path:
  """Writes `report.html` from the files that a run has written so far, and returns its path.

  Raises:
    ConfigError: the folder holds no run.
  """
  config, about = _config(workdir), _about(workdir)
  rows, events = _numbers(read_rows(workdir / 'metrics.jsonl')), _events(workdir)
  layers = _layers(_some(read_rows(workdir / 'layers.jsonl')))
  scores = [row for row in rows if 'seconds' in row]
  times = [row for row in rows if 'compute_seconds' in row]
  title = f'{config["optimizer"]} on {config["data"]["name"]}'
  page = render(
    'run.html',
    title=title,
    subtitle=f'{config["model"]["name"]}, batch {config["data"]["batch_size"]}, {config["mesh"]}, seed {config["seed"]}',
    status=_status(config, rows, events),
    cards=_cards(config, about, rows, scores, times),
    learning=_learning(config, about, rows, scores, times),
    samples=_samples(workdir),
    times=_times(times),
    health=_health(layers),
    layers=_layer_table(layers),
    events=events,
    about=[('folder', workdir), *((k.replace('_', ' '), v) for k, v in about.items() if v not in ('', None))],
    coverage=_text(workdir / 'coverage.txt'),
    config=jsonfile.dumps(config, indent=2),
  )
  path = workdir / _NAME
  files.write(path, page)
  return path


def _config(workdir: Path) -> dict[str, Any]:
  """Reads a run's config. A value that an older release lacks, or of another type, becomes the default.

  Raises:
    ConfigError: the folder has no config.
  """
  try:
    config = jsonfile.read(workdir / 'config.json')
    if not isinstance(config, dict):
      raise ValueError('no config')
  except (OSError, ValueError) as error:
    raise ConfigError(f'{workdir} holds no run: config.json cannot be read') from error
  usual = as_json(defaults())
  for key in ('optimizer', 'mesh', 'seed', 'steps', 'target', 'data', 'model'):
    if key not in config or (type(config[key]) is not type(usual[key]) and not _both_numbers(config[key], usual[key])):
      config[key] = usual[key]
  config['data'] = {'name': '', 'batch_size': 0, **config['data']}
  config['model'] = {'name': '', **config['model']}
  return config


def _both_numbers(a: Any, b: Any) -> bool:
  return all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))


def _about(workdir: Path) -> dict[str, Any]:
  """Reads what `about.json` says of where a run was trained; {} if it cannot be read."""
  try:
    about = jsonfile.read(workdir / 'about.json')
  except (OSError, ValueError):
    return {}
  plain = {k: v for k, v in about.items() if isinstance(v, str | int | float)} if isinstance(about, dict) else {}
  if not isinstance(plain.get('target_metric', ''), str) or not isinstance(plain.get('parameters', 0), int | float):
    return {}
  return plain


def _text(path: Path) -> str:
  """Reads the first megabyte of a text file; '' if there is no file."""
  if not path.is_file():
    return ''
  with path.open('rb') as file:
    return file.read(2**20).decode(errors='replace')


def _numbers(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
  """Drops values that are not numbers or too large for a chart, since a damaged file may hold anything."""
  fits = lambda v: isinstance(v, int | float) and (v != v or abs(v) < 1e300)  # noqa: E731
  return [{k: v for k, v in row.items() if fits(v)} for row in rows]


def _events(workdir: Path) -> list[dict[str, Any]]:
  """Reads the unusual events of a run, without rows that lack a time, a kind or words."""
  rows = read_rows(workdir / 'events.jsonl')
  return [row for row in rows if all(isinstance(row.get(key), str) for key in ('time', 'kind', 'words'))]


def _some(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Picks at most as many rows as a chart can show, evenly spaced and including the last."""
  every = 1 + len(rows) // _ROWS
  return [*rows[:-1][::every], *rows[-1:]]


def _layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the valid rows of numbers by layer."""
  parts = []
  for row in rows:
    layers = row.get('layers')
    if isinstance(layers, dict) and all(isinstance(numbers, dict) for numbers in layers.values()):
      parts.append({'step': row['step'], 'layers': dict(zip(layers, _numbers(list(layers.values())), strict=True))})
  return parts


def _status(config: dict[str, Any], rows: list, events: list) -> dict[str, str]:
  done = max((row['step'] for row in rows), default=0)
  last = events[-1] if events else {}
  if last.get('kind') in ('error', 'stopped') and last['step'] >= done - 1:
    return {'kind': 'bad' if last['kind'] == 'error' else 'soft', 'words': last['words']}
  if done >= config['steps']:
    return {'kind': 'good', 'words': f'Finished: {done:,} steps.'}
  return {'kind': 'soft', 'words': f'{done:,} of {config["steps"]:,} steps.'}


def _cards(config: dict, about: dict, rows: list, scores: list, times: list) -> list[dict[str, str]]:
  cards = []
  metric, lower = about.get('target_metric'), about.get('lower_is_better', True)
  key = f'eval_{metric}'
  scores = [row for row in scores if key in row]
  if scores:
    best = (min if lower else max)(scores, key=lambda row: row[key])
    cards.append((f'{metric} at the end', f'{scores[-1][key]:.4g}'))
    cards.append((f'best {metric}, step {best["step"]:,}', f'{best[key]:.4g}'))
    if config['target']:
      sign = 1 if lower else -1
      first = next((r for r in scores if sign * r[key] <= sign * config['target']), None)
      cards.append((f'steps to {metric} {config["target"]:g}', f'{first["step"]:,}' if first else 'not reached'))
  losses = [row['loss'] for row in rows if 'loss' in row]
  if losses:
    cards.append(('training loss, last step', f'{losses[-1]:.4g}'))
  rates = sorted(row['examples_per_second'] for row in times if 'examples_per_second' in row)
  if rates:
    cards.append(('examples a second, median', short(rates[len(rates) // 2])))
  shares = sorted(row['mfu'] for row in times if 'mfu' in row)
  if shares:
    cards.append(('of the peak flops (MFU)', f'{shares[len(shares) // 2]:.1%}'))
  if about.get('parameters'):
    cards.append(('parameters', short(about['parameters'])))
  return [{'name': name, 'value': value} for name, value in cards]


def _learning(config: dict, about: dict, rows: list, scores: list, times: list) -> list[Any]:
  of = lambda rows_given, key: [(row['step'], row[key]) for row in rows_given if key in row]  # noqa: E731
  metric = about.get('target_metric')
  names = list(dict.fromkeys(k for row in scores for k in row if k.startswith('eval_')))
  charts = [chart('loss', {'training': of(rows, 'loss'), 'evaluation': of(scores, 'eval_loss')})]
  for name in names:
    plain = name.removeprefix('eval_')
    if plain != 'loss':
      target = config['target'] if plain == metric and config['target'] else None
      charts.append(chart(plain, {'training': of(rows, plain), 'evaluation': of(scores, name)}, target=target))
  if metric:
    key = f'eval_{metric}'
    seconds = {'evaluation': [(row['seconds'], row[key]) for row in scores if key in row]}
    charts.append(chart(metric, seconds, x='seconds of training'))
  charts.append(chart('examples a second', {'rate': of(times, 'examples_per_second')}))
  for name in ('clip', 'damping', 'learning_rate', 'loss_scale'):
    charts.append(chart(name.replace('_', ' '), {name: of(rows, name)}))
  return [c for c in charts if c]


def _samples(workdir: Path) -> list[dict[str, str]]:
  """Returns the first, the middle and the last picture as data URLs, which the page contains."""
  pictures = [f for f in (workdir / 'samples').glob('*.png') if f.stem.isascii() and f.stem.isdigit() and f.is_file()]
  files = sorted(f for f in pictures if f.stat().st_size <= _LARGEST)
  chosen = dict.fromkeys((files[0], files[len(files) // 2], files[-1])) if files else ()
  data = lambda f: f'data:image/png;base64,{base64.b64encode(f.read_bytes()).decode()}'  # noqa: E731
  return [{'step': f'{int(f.stem):,}', 'data': data(f)} for f in chosen]


def _times(times: list) -> list[dict[str, Any]]:
  if not times:
    return []
  parts = {k.removesuffix('_seconds'): v for k, v in times[-1].items() if k.endswith('_seconds')}
  total = sum(parts.values()) or 1.0
  return [{'name': k, 'seconds': f'{v:.1f} s', 'share': f'{100 * v / total:.1f}'} for k, v in parts.items()]


def _health(layers: list) -> list[Any]:
  """Draws a chart for each quantity of the layers, with a line for each layer."""
  keys = dict.fromkeys(k for row in layers for numbers in row['layers'].values() for k in numbers)
  charts = []
  for key in keys:
    if key == 'refresh_interval' or key.startswith('largest'):
      continue
    series: dict[str, list] = {}
    for row in layers:
      for name, numbers in row['layers'].items():
        if key in numbers:
          series.setdefault(name, []).append((row['step'], numbers[key]))
    charts.append(chart(key.replace('_', ' '), series, faint=len(series) > _MANY))
  return [c for c in charts if c]


def _layer_table(layers: list) -> dict[str, Any]:
  if not layers:
    return {'rows': []}
  last = layers[-1]
  keys = list(dict.fromkeys(k for numbers in last['layers'].values() for k in numbers))
  cells = lambda numbers: [short(numbers[k]) if k in numbers else '' for k in keys]  # noqa: E731
  rows = [[name, *cells(numbers)] for name, numbers in last['layers'].items()]
  return {'step': f'{last["step"]:,}', 'head': ['layer', *(k.replace('_', ' ') for k in keys)], 'rows': rows}
