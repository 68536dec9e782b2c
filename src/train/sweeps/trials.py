"""Trials: short runs of a config with several settings, logged so that a later call goes on where one stopped."""

from __future__ import annotations

import collections
import copy
import json
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import files, parallel
from .. import jsonfile
from ..build import build
from ..errors import ConfigError, Diverged, Preempted, Stopped
from ..inputs import known_by
from ..loop import train
from ..registry import make_task
from ..task import first_at

SEED = 1000  # of all trials; `kronmesh compare` uses others

Trial = dict[str, Any]


def check_trials(trials: Sequence[Trial]) -> None:
  """Raises ConfigError unless every trial names its optimiser and all optimisers have equally many trials."""
  if any('optimizer' not in trial for trial in trials):
    raise ConfigError("sweep() must name the 'optimizer' in everything it yields")
  counts = collections.Counter(trial['optimizer'] for trial in trials)
  if len(set(counts.values())) > 1:
    raise ConfigError(f'sweep() must try every optimiser equally often, not {dict(counts)}')


def attempt(config: Any, trial: Trial, seed: int) -> dict[str, Any]:
  """Trains once. `final` is None if the run diverged, and `curve` holds its evaluations, (step, value).

  Raises:
    RunError: the run ended for another reason, which says nothing about the setting.
  """
  variant = copy.deepcopy(config)
  variant.update_from_flattened_dict(trial)
  variant.seed, variant.keep_checkpoints = seed, 0
  run = build(variant)
  with tempfile.TemporaryDirectory() as folder:
    try:
      rows = train(variant, folder, quiet=True, run=run)
    except Diverged:
      return {'curve': [], 'final': None}
    except Stopped as error:
      raise Preempted('told to stop within a trial; the same command goes on with it') from error
  curve = [(row['step'], row[f'eval_{run.task.target}']) for row in rows]
  return {'curve': curve, 'final': curve[-1][1]}


def scored(row: dict[str, Any], config: Any) -> dict[str, Any]:
  """Adds `steps`, the steps to the config's current target, to a logged trial; None if it was not reached."""
  task = make_task(config)
  rows = [{'step': step, f'eval_{task.target}': value} for step, value in row['curve']]
  reached = first_at(config.target, task, rows)
  return {**row, 'steps': reached['step'] if reached else None}


def logged_trials(log: Path, mark: str) -> dict[str, dict[str, Any]]:
  """Returns the rows of a log by their trial, as JSON, without those of other configs and without invalid lines.

  mark: the config's `fingerprint`.
  """
  rows, bad = jsonfile.read_lines(log)
  whole = [row for row in rows if {'trial', 'config', 'curve', 'final'} <= row.keys() and _is_curve(row['curve'])]
  bad += len(rows) - len(whole)
  if bad:
    print(f'{log}: {bad} lines cannot be read; their trials are run again', file=sys.stderr)
  # A diverged trial has no final value. This is written as null and read as NaN.
  final = lambda row: None if row['final'] != row['final'] else row['final']  # noqa: E731
  return {jsonfile.dumps(row['trial']): {**row, 'final': final(row)} for row in whole if row['config'] == mark}


def _is_curve(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(point, list) and len(point) == 2 for point in value)


def try_all(config: Any, trials: Sequence[Trial], log: Path, seed: int) -> list[dict[str, Any]]:
  """Runs the trials that the log does not yet hold for this config, and returns the rows of all trials in order."""
  log.parent.mkdir(parents=True, exist_ok=True)
  mark = fingerprint(config)
  done = logged_trials(log, mark)
  for i, trial in enumerate(trials):
    key = jsonfile.dumps(trial)
    if key not in done:
      done[key] = {'trial': trial, 'config': mark, **attempt(config, trial, seed)}
      files.append_lines(log, [jsonfile.dumps(done[key])], sync=True)
    done[key] = scored(done[key], config)
    steps, final = done[key]['steps'], done[key]['final']
    reached = f'target at step {steps}' if steps else 'target not reached'
    words = ' '.join(f'{name}={value}' for name, value in trial.items())
    end = 'diverged' if final is None else f'final {final:.4g}'
    print(f'{i + 1}/{len(trials)} {words}: {reached}, {end}', flush=True)
  return [done[jsonfile.dumps(trial)] for trial in trials]


def fingerprint(config: Any) -> str:
  """Returns a checksum of the data and of the config, without the seed, the optimiser's name and the target.

  Trials set the first two themselves, and the target may be changed afterwards.
  """
  values = json.loads(config.to_json())
  for name in ('seed', 'optimizer', 'target'):
    values.pop(name)
  values['known_by'] = known_by(config, parallel.make_mesh(config.mesh))
  return f'{zlib.crc32(jsonfile.dumps(values, sort_keys=True).encode()):08x}'


def rank(score: dict[str, Any], lower_is_better: bool) -> tuple[float, float]:
  """Returns a key that sorts scores, best first."""
  steps = float('inf') if score['steps'] is None else score['steps']
  if score['final'] is None:
    return steps, float('inf')
  return steps, score['final'] if lower_is_better else -score['final']
