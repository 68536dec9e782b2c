"""A page about one run: settings, curves, predictions, layers, events and config. It needs only a browser."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

from ... import files
from .. import jsonfile
from ..errors import ConfigError
from ..runtime.workdir import as_json, read_rows
from ..settings.defaults import defaults
from . import clock as clocks
from . import facts, glossary, sections
from .charts import numbered, render, thinned
from .predictions import NAME as PREDICTIONS

_NAME = 'report.html'
_ROWS = 300  # rows of layers that charts use
_EVENTS = 200  # events that the page shows
_LARGEST = 2**24  # the most bytes of a picture in the page
RELOAD = 30  # seconds after which the page of a run in training loads itself anew


def write_report(workdir: Path, running: bool = False) -> Path:
  """Writes `report.html` from the files that a run has written so far, and returns its path.

  running: whether the run goes on, so that the page loads itself anew from time to time.

  Raises:
    ConfigError: the folder holds no run.
  """
  config, about = _config(workdir), _about(workdir)
  rows, events = _numbers(read_rows(workdir / 'metrics.jsonl')), _events(workdir)
  layers = _layers(_some(read_rows(workdir / 'layers.jsonl')))
  scores = [row for row in rows if 'seconds' in row]
  times = [row for row in rows if 'compute_seconds' in row]
  clock = clocks.clock(times)
  learning, health = sections.learning(config, about, rows, scores, times), sections.health(layers)
  predictions = sections.predictions(_json(workdir / PREDICTIONS))
  confusion = predictions['matrix']
  charts = numbered([*learning, *([confusion] if confusion else []), *health])
  page = render(
    'run.html',
    title=f'{config["optimizer"]} on {config["data"]["name"]}',
    status=_status(config, rows, events, running),
    running=running,
    written=time.strftime('%H:%M:%S') if running else '',
    settings=facts.settings(config),
    command=about.get('command', ''),
    origin=[*facts.origin(about), ('folder', str(workdir))],
    cards=sections.cards(config, about, rows, scores, times),
    learning=learning,
    samples=_samples(workdir),
    times=sections.times_of_parts(times, clock.whole),
    predictions=predictions,
    confusion=confusion,
    health=health,
    layers=sections.layer_table(layers),
    events=events[-_EVENTS:],
    earlier=max(0, len(events) - _EVENTS),
    coverage=_text(workdir / 'coverage.txt'),
    terms=glossary.TERMS,
    config=jsonfile.dumps(config, indent=2),
    data={
      'name': workdir.name,
      'running': running,
      'reload': RELOAD,
      **({'written': round(time.time())} if running else {}),
      'clock': thinned(list(zip(clock.steps, clock.seconds, strict=True))),
      'compiles': clock.whole,
      'charts': charts,
    },
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


def _json(path: Path) -> Any:
  """Returns the value of a JSON file; None if it cannot be read."""
  try:
    return jsonfile.read(path)
  except (OSError, ValueError):
    return None


def _about(workdir: Path) -> dict[str, Any]:
  """Reads what `about.json` says of where a run was trained; {} if it cannot be read."""
  about = _json(workdir / 'about.json')
  plain = {k: v for k, v in about.items() if isinstance(v, str | int | float)} if isinstance(about, dict) else {}
  if not isinstance(plain.get('target_metric', ''), str) or not isinstance(plain.get('parameters', 0), int | float):
    return {}
  return plain


def _text(path: Path) -> str:
  """Reads the first 100,000 bytes of a text file; '' if there is no file."""
  if not path.is_file():
    return ''
  with path.open('rb') as file:
    return file.read(100_000).decode(errors='replace')


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


def _status(config: dict[str, Any], rows: list, events: list, running: bool) -> dict[str, str]:
  done = max((row['step'] for row in rows), default=0)
  last = events[-1] if events else {}
  if running:
    return {'kind': 'soft', 'words': f'Running: {done:,} of {config["steps"]:,} steps.'}
  if last.get('kind') in ('error', 'stopped') and last['step'] >= done - 1:
    return {'kind': 'bad' if last['kind'] == 'error' else 'soft', 'words': last['words']}
  if done >= config['steps']:
    return {'kind': 'good', 'words': f'Finished: {done:,} steps.'}
  return {'kind': 'soft', 'words': f'{done:,} of {config["steps"]:,} steps.'}


def _samples(workdir: Path) -> list[dict[str, str]]:
  """Returns the first, the middle and the last picture as data URLs, which the page contains."""
  pictures = [f for f in (workdir / 'samples').glob('*.png') if f.stem.isascii() and f.stem.isdigit() and f.is_file()]
  files = sorted(f for f in pictures if f.stat().st_size <= _LARGEST)
  chosen = dict.fromkeys((files[0], files[len(files) // 2], files[-1])) if files else ()
  data = lambda f: f'data:image/png;base64,{base64.b64encode(f.read_bytes()).decode()}'  # noqa: E731
  return [{'step': f'{int(f.stem):,}', 'data': data(f)} for f in chosen]
