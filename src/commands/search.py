"""Tries the settings that a config's `sweep()` yields, equally many per optimiser, and prints the best of each.

  kronmesh search --config=digits --workdir=runs/search

The best setting takes the fewest steps to the target; among equals it has the best final value. All trials use one
seed, which `kronmesh compare` does not use. A second call goes on where the first stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

from ..train.build import check_target
from ..train.errors import ConfigError
from ..train.registry import make_task
from ..train.runtime.workdir import storage_errors
from ..train.settings.configfile import config_functions, config_path
from ..train.sweeps.trials import SEED, check_trials, rank, try_all


def main(config: Any, workdir: str) -> None:
  """Runs all trials of the config's sweep() and prints the best setting of each optimiser."""
  sweep = config_functions().get('sweep')
  if sweep is None:
    raise ConfigError(f'{config_path()} has no sweep(): a function that yields overrides')
  trials = list(sweep())
  check_trials(trials)
  check_target(config)
  log = Path(workdir) / 'trials.jsonl'
  with storage_errors(log.parent):
    done = try_all(config, trials, log, SEED)

  lower = make_task(config).lower_is_better
  print(f'\nbest of {len(trials)} trials, {config.steps} steps, target {config.target:g}:')
  for optimizer in dict.fromkeys(trial['optimizer'] for trial in trials):
    scores = [score for score in done if score['trial']['optimizer'] == optimizer]
    best = min(scores, key=lambda score: rank(score, lower))
    words = ' '.join(f'--config.{k}={v}' for k, v in best['trial'].items())
    print(f'  {words}   (steps {best["steps"]}, final {best["final"]})')
  print(f'all trials: {log}')


def command() -> None:
  """Runs the trials of the config that the command line names."""
  launch(main, default_workdir='runs/search')
