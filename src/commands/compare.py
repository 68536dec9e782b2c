"""Runs one config with several optimisers and seeds, and writes a table, a JSON file and pictures.

  kronmesh compare --config=digits --workdir=runs/digits
  kronmesh compare --config=poisson --optimizers=kfac,adam,muon --trials=6
  kronmesh compare --config=digits --optimizers=kfac,kfac:inverses_every=10,stale_kfac

With --trials each optimiser's settings are chosen first, with the same number of runs for each. A second call goes on
where the first stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from ..train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
import numpy as np
from absl import flags
from scipy.stats import qmc

from .. import files
from ..train import jsonfile, kfac_jax_peer
from ..train.build import Run, build, check_target
from ..train.checkpoints import load_export
from ..train.errors import ConfigError, Diverged
from ..train.loop import arrived, train
from ..train.optimizers import MISSING, PEERS, SECOND_ORDER
from ..train.registry import TASKS, make_task
from ..train.reporting.tables import columns
from ..train.runtime.workdir import evaluations, read_rows
from ..train.settings import defaults
from ..train.settings.configfile import config_functions, config_path, short_name
from ..train.steps import phase
from ..train.sweeps.trials import SEED, rank, try_all
from ..train.sweeps.variants import member
from ..train.task import first_at
from .pictures import picture_curves, picture_reconstructions

OPTIMIZERS_FLAG = flags.DEFINE_list(
  'optimizers',
  ['kfac', 'sgd', 'adam', 'muon'],
  'The optimisers to compare; behind colons with settings of their own: kfac:inverses_every=10:steps=150.',
)
SEEDS = flags.DEFINE_integer('seeds', 3, 'How many seeds each optimiser runs with.', lower_bound=1)
TRIALS = flags.DEFINE_integer('trials', 0, 'Settings tried for each optimiser before; 0: those of the config.', 0)
_TARGETS = flags.DEFINE_list('targets', [], 'More values of the metric whose steps are to be told.')


def compare(config: Any, workdir: Path, members: list[str], seeds: int, trials: int = 0) -> list[dict[str, Any]]:
  """Trains all members and returns a summary of each. All seeds of a member use the same compiled programs."""
  summaries, pictures = [], {}
  for name in members:
    odd = files.first_odd(workdir / name)
    if odd is not None:
      raise ConfigError(
        f'{odd[0]} is {odd[1]}, through which a run does not write; remove it, or choose another --workdir'
      )
    variant, settings = member(config, name)
    chosen = tune(variant, settings, workdir, trials) if trials else {}
    variant.update_from_flattened_dict(chosen)
    run = build(variant)
    folders = [workdir / name / f'seed{seed}' for seed in range(seeds)]
    if not all(is_complete(run, folder) for folder in folders):
      warm_up(run)
    curves = []
    for seed, folder in enumerate(folders):
      variant.seed = seed
      try:
        curves.append(train(variant, folder, run=run))
      except Diverged as error:
        print(f'{name}, seed {seed}: {error}', file=sys.stderr)
        curves.append(None)
    settings = json.loads(variant.to_json())[variant.optimizer]
    saved = median([last_metrics(folder).get('refreshes_saved') for folder in folders])
    summaries.append({
      **summarise(name, run, curves), 'settings': settings, 'chosen': chosen, 'refreshes_saved': saved
    })  # fmt: skip
    if config.task == 'reconstruct' and curves[0]:
      pictures['image'], pictures[name] = reconstruct(run, folders[0])
  if pictures:
    picture_reconstructions(pictures, workdir / 'reconstructions.png')
  return summaries


def why_not(name: str) -> str | None:
  """Says in one line why a member cannot run here, whatever its settings, or returns None if it can."""
  optimizer = name.partition(':')[0]
  return kfac_jax_peer.why_not() if optimizer == kfac_jax_peer.NAME else MISSING.get(optimizer)


def tune(config: Any, settings: dict[str, Any], workdir: Path, trials: int) -> dict[str, float]:
  """Returns the best of `trials` settings from the optimiser's space (see `defaults.spaces`); trials.jsonl has all."""
  spaces = {**defaults.spaces(), **config_functions().get('spaces', dict)()}
  drawn = [{**trial, **settings} for trial in draw(config.optimizer, spaces[config.optimizer], trials)]
  done = try_all(config, drawn, workdir / 'trials.jsonl', SEED)
  lower = make_task(config).lower_is_better
  return min(done, key=lambda score: rank(score, lower))['trial']


def draw(optimizer: str, space: dict[str, tuple[float, float]], trials: int) -> list[dict[str, Any]]:
  """Returns `trials` points of Halton's sequence in the space, the first after 0, on a logarithmic scale."""
  points = qmc.Halton(d=len(space), scramble=False).random(trials + 1)[1:]
  result = []
  for point in points:
    trial: dict[str, Any] = {'optimizer': optimizer}
    for (name, (low, high)), x in zip(space.items(), point, strict=True):
      value = float(f'{low * (high / low) ** x:.3g}')
      trial[f'{optimizer}.{name.removeprefix("1-")}'] = round(1 - value, 6) if name.startswith('1-') else value
    result.append(trial)
  return result


def reconstruct(run: Run, folder: Path, n: int = 12) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first images of the evaluation set and the model's reconstructions, each (n, height, width)."""
  variables, _ = load_export(folder / 'export')
  images = np.asarray(next(run.eval_batches())['inputs'])[:n]
  made = jax.nn.sigmoid(run.task.model.apply(variables, images))
  return images[..., 0], np.asarray(made).reshape(images.shape)[..., 0]


def warm_up(run: Run) -> None:
  """Compiles every program of a run, so that the seconds of its curves measure training alone."""
  batch = next(run.train_batches(0, 0))
  kinds = {phase(run.config, step): step for step in reversed(range(run.config.steps))}
  for step in sorted(kinds.values()):
    run.step(run.init(0), batch, step)


def is_complete(run: Run, folder: Path) -> bool:
  """Checks whether the run in the folder has nothing left to do."""
  rows = evaluations(folder)
  return bool(rows) and (rows[-1]['step'] >= run.config.steps or arrived(run, rows))


def last_metrics(folder: Path) -> dict[str, float]:
  """Returns the metrics that a run logged at its last step."""
  rows = read_rows(folder / 'metrics.jsonl')
  return next((row for row in reversed(rows) if 'loss' in row), {})


def summarise(name: str, run: Run, curves: list[list[dict[str, float]] | None]) -> dict[str, Any]:
  """Summarises the runs of one optimiser. A curve of None is a run that diverged.

  targets: value -> for each seed the first evaluation that reached it, as {'step', 'seconds', 'examples'}, or None.
  """
  key, config = f'eval_{run.task.target}', run.config
  paces = [1000 * rows[-1]['seconds'] / rows[-1]['step'] for rows in curves if rows]

  def reached(target: float, rows: list[dict[str, float]] | None) -> dict[str, float] | None:
    row = first_at(target, run.task, rows or [])
    return row and {'step': row['step'], 'seconds': row['seconds'], 'examples': row['step'] * config.data.batch_size}

  return {
    'optimizer': name,
    'budget': config.steps,
    'targets': {f'{t:g}': [reached(t, rows) for rows in curves] for t in _targets(config)},
    'final': [rows[-1][key] if rows else None for rows in curves],
    'ms_per_step': statistics.median(paces) if paces else None,
    'curves': [[(row['step'], row['seconds'], row[key]) for row in rows] for rows in curves if rows],
  }


def _targets(config: Any) -> list[float]:
  try:
    more = [float(t) for t in _TARGETS.value]
  except ValueError as error:
    raise ConfigError(f'--targets={",".join(_TARGETS.value)} must be numbers') from error
  lower = TASKS[config.task].lower_is_better
  return sorted({config.target, *more}, reverse=lower)  # the easiest first


def median(values: list[float | None]) -> float | None:
  """Returns the median of the values, or None if most are None."""
  middle = statistics.median(float('inf') if v is None else v for v in values)
  return None if middle == float('inf') else middle


def _spread(values: list[float | None], form: str) -> str:
  """Formats the median, followed by the range if the values differ."""
  middle = median(values)
  text = '-' if middle is None else format(middle, form)
  ends = [float('inf') if v is None else v for v in values]
  words = ['-' if v == float('inf') else format(v, form) for v in (min(ends), max(ends))]
  return text if words[0] == words[1] == text else f'{text} ({words[0]} to {words[1]})'


def table(summaries: list[dict[str, Any]], target: str, metric: str) -> str:
  """Formats one row for each optimiser, with medians (and ranges) over the seeds.

  The third column has the first optimiser's steps as a percentage of the row's. '>' marks a target not reached in the
  budget. Errors are those of the evaluation set.
  """
  of = lambda s, field: [row and row[field] for row in s['targets'][target]]  # noqa: E731
  first = median(of(summaries[0], 'step'))
  share_of = f"{summaries[0]['optimizer']}'s steps are"
  metric = f'evaluation {metric}'
  head = ('optimiser', f'steps to {metric} {target}', share_of, 'seconds', 'examples', f'final {metric}', 'ms a step')
  rows = []
  for s in summaries:
    steps = median(of(s, 'step'))
    share = '' if steps else 'less than '
    share = f'{share}{first / (steps or s["budget"]):.0%} of these' if first and s is not summaries[0] else '-'
    rows.append((
      s['optimizer'],
      _spread(of(s, 'step'), 'g') if steps else f'> {s["budget"]}',
      share,
      _spread(of(s, 'seconds'), '.1f'),
      '-' if steps is None else f'{median(of(s, "examples")):,.0f}',
      _spread(s['final'], '.4g'),
      '-' if s['ms_per_step'] is None else f'{s["ms_per_step"]:.1f}',
    ))  # fmt: skip
  return columns(head, rows)


def main(config: Any, workdir: str) -> None:
  folder = Path(workdir)
  check_target(config)
  _targets(config)
  missing = {name: f'{name}: not run: {why}' for name in OPTIMIZERS_FLAG.value if (why := why_not(name))}
  names = [name for name in OPTIMIZERS_FLAG.value if name not in missing]
  for name in names:
    member(config, name)
  if not names:
    raise ConfigError('--optimizers: none of these can run: ' + '; '.join(missing.values()))
  summaries = compare(config, folder, names, SEEDS.value, TRIALS.value)
  task = make_task(config)
  texts = [table(summaries, target, task.target) for target in summaries[0]['targets']]
  saved = [
    f'{s["optimizer"]}: {1 - s["refreshes_saved"]:.1%} of the refreshes of every factor at every step'
    for s in summaries
    if s['refreshes_saved'] is not None
  ]
  alone = [f'{name}: trained by its own package on one device' for name in names if name.partition(':')[0] in PEERS]
  text = '\n'.join(['\n\n'.join(texts), *saved, *alone, *missing.values()])
  files.write(folder / 'table.txt', text + '\n')
  files.write(
    folder / 'compare.json',
    jsonfile.dumps({'config': json.loads(config.to_json()), 'results': summaries}, indent=1) + '\n',
  )
  picture_curves(summaries, config, task, folder / 'curves.png')
  first = folder / names[0] / 'seed0'
  print(f'\n{text}\n')
  print(
    f'medians (and ranges) of {SEEDS.value} seeds, {config.steps} steps each where nothing else is said, '
    f'mesh {config.mesh}; seconds are without compilation'
  )
  if TRIALS.value:
    print(f'{TRIALS.value} settings tried for each      {folder / "trials.jsonl"}')
  print(f'curves                 {folder / "curves.png"}')
  if config.task == 'reconstruct':
    print(f'reconstructions        {folder / "reconstructions.png"}')
  print(f'a page for each run    {first / "report.html"}')
  print(f'metrics, checkpoints   {first}')
  if names[0].partition(':')[0] in SECOND_ORDER:
    print(f'what K-FAC covers      {first / "coverage.txt"}')
  installed = 'kronmesh' if shutil.which('kronmesh') else f'{os.path.relpath(sys.prefix)}/bin/kronmesh'
  command = f'{installed} train --config={short_name(config_path())}'
  print('next, one run with one setting changed:')
  print(f'  {command} --config.kfac.damping=0.03 --workdir=runs/damping')


def command() -> None:
  """Compares optimisers on the config that the command line names."""
  launch(main, default_workdir='runs/compare')
