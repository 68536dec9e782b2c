"""Runs one config by several optimisers and seeds, and writes a table, a JSON file and pictures.

python scripts/compare.py --config=experiments/configs/digits.py --workdir=runs/digits
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
import matplotlib
import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments.checkpoints import open_checkpoints, restore
from experiments.errors import ConfigError
from experiments.optimizers import OPTIMIZERS
from experiments.tasks import Task, make_task
from experiments.train import Run, build, check_target, first_at_target, phase, train

matplotlib.use('Agg')
import matplotlib.pyplot as plt

_OPTIMIZERS = flags.DEFINE_list('optimizers', list(OPTIMIZERS), 'The optimisers to compare.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'How many seeds each optimiser runs with.', lower_bound=1)


def compare(config: Any, workdir: Path, optimizers: list[str], seeds: int) -> list[dict[str, Any]]:
  """Trains all members, seed by seed over one compiled program, and returns one summary for each optimiser."""
  summaries, pictures = [], {}
  for name in optimizers:
    own = copy.deepcopy(config)
    own.optimizer = name
    run = build(own)
    folders = [workdir / name / f'seed{seed}' for seed in range(seeds)]
    if not all(_logged(folder, own.steps) for folder in folders):
      warm_up(run)
    curves = []
    for seed, folder in enumerate(folders):
      own.seed = seed
      rows = train(own, folder, run=run)
      curves.append(rows or _logged(folder, own.steps))
    summaries.append(summarise(name, run, curves))
    if config.task == 'reconstruct':
      pictures['image'], pictures[name] = reconstruct(run, folders[0])
  if pictures:
    _picture_reconstructions(pictures, workdir / 'reconstructions.png')
  return summaries


def reconstruct(run: Run, folder: Path, n: int = 12) -> tuple[np.ndarray, np.ndarray]:
  """The first images of the evaluation set, and what the run's last checkpoint makes of them: (n, height, width)."""
  with open_checkpoints(folder) as checkpoints:
    params = jax.device_get(restore(run, checkpoints).params)
  images = np.asarray(next(run.eval_batches())['image'])[:n]
  made = jax.nn.sigmoid(run.task.model.apply({'params': params}, images))
  return images[..., 0], np.asarray(made).reshape(images.shape)[..., 0]


def warm_up(run: Run) -> None:
  """Compiles every program of a run, so that the seconds of its curves are of training alone."""
  batch = next(run.train_batches(0, 0))
  for at in {phase(run.config, step) for step in range(run.config.steps)}:
    run.step(run.init(0), batch, *at)


def _logged(folder: Path, steps: int) -> list[dict[str, float]]:
  """The evaluations of a run that is complete; none of any other."""
  log = folder / 'metrics.jsonl'
  rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
  return [row for row in rows if 'seconds' in row] if rows and rows[-1]['step'] >= steps else []


def summarise(name: str, run: Run, curves: list[list[dict[str, float]]]) -> dict[str, Any]:
  """Medians over the seeds; steps and seconds to the target are None unless most seeds reach it."""
  key = f'eval_{run.task.target}'
  reached = [first_at_target(run, rows) for rows in curves]

  def median(field: str) -> float | None:
    values = [row[field] if row else float('inf') for row in reached]
    middle = statistics.median(values)
    return None if middle == float('inf') else middle

  paces = [1000 * rows[-1]['seconds'] / rows[-1]['step'] for rows in curves]
  return {
    'optimizer': name,
    'steps_to_target': median('step'),
    'steps_by_seed': [row['step'] if row else None for row in reached],
    'seconds_to_target': median('seconds'),
    'final': statistics.median(rows[-1][key] for rows in curves),
    'ms_per_step': statistics.median(paces),
    'curves': [[(row['step'], row['seconds'], row[key]) for row in rows] for rows in curves],
  }


def table(summaries: list[dict[str, Any]], target: float, metric: str, budget: int) -> str:
  """One row for each optimiser; the fourth column is the first optimiser's steps as a share of the row's."""
  first = summaries[0]
  head = (
    'optimiser',
    f'steps to {metric} {target:g}',
    '(of each seed)',
    f'{first["optimizer"]} needs',
    'seconds',
    f'final {metric}',
    'ms a step',
  )
  rows = [head]
  for s in summaries:
    steps, share = s['steps_to_target'], '-'
    if first['steps_to_target']:
      share = ('' if steps else '< ') + f'{first["steps_to_target"] / (steps or budget):.2f} of it'
    rows.append((
      s['optimizer'],
      f'{steps:g}' if steps else f'> {budget}',
      ' '.join('-' if n is None else str(n) for n in s['steps_by_seed']),
      share,
      '-' if s['seconds_to_target'] is None else f'{s["seconds_to_target"]:.1f}',
      f'{s["final"]:.4g}',
      f'{s["ms_per_step"]:.1f}',
    ))  # fmt: skip
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def _picture_curves(summaries: list[dict[str, Any]], config: Any, task: Task, path: Path) -> None:
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained', sharey=True)
  for i, s in enumerate(summaries):
    for j, curve in enumerate(s['curves']):
      steps, seconds, values = np.asarray(curve).T
      for axis, x in zip(axes, (steps, seconds), strict=True):
        axis.plot(x, values, color=f'C{i}', alpha=0.8, linewidth=1.3, label=s['optimizer'] if j == 0 else None)
  for axis, label in zip(axes, ('step', 'seconds of training on this machine'), strict=True):
    axis.axhline(config.target, color='black', linewidth=0.8, linestyle=':')
    axis.set_xlabel(label)
    if task.lower_is_better:
      axis.set_yscale('log')
    else:
      axis.set_ylim(bottom=config.target - 0.15)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(f'{task.target} ({config.data.eval_split})')
  axes[0].annotate('target', (0, config.target), xytext=(2, 3), textcoords='offset points', fontsize=8)
  axes[0].legend(frameon=False)
  figure.suptitle(f'{config.model.name} on {config.data.name}, batch {config.data.batch_size}, mesh {config.mesh}')
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _picture_reconstructions(pictures: dict[str, np.ndarray], path: Path) -> None:
  """One row of images for each name."""
  n = len(next(iter(pictures.values())))
  size = (n * 0.8, len(pictures) * 0.85)
  figure, axes = plt.subplots(len(pictures), n, figsize=size, layout='constrained', squeeze=False)
  for row, (name, images) in zip(axes, pictures.items(), strict=True):
    row[0].set_ylabel(name)
    for axis, image in zip(row, images, strict=True):
      axis.imshow(image, cmap='gray_r', vmin=0, vmax=1)
      axis.set_xticks([])
      axis.set_yticks([])
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main(config: Any, workdir: str) -> None:
  folder = Path(workdir)
  unknown = sorted(set(_OPTIMIZERS.value) - set(OPTIMIZERS))
  if unknown:
    raise ConfigError(f'--optimizers: {unknown[0]!r} is unknown; choose from {", ".join(OPTIMIZERS)}')
  check_target(config)
  summaries = compare(config, folder, _OPTIMIZERS.value, _SEEDS.value)
  task = make_task(config)
  text = table(summaries, config.target, task.target, config.steps)
  (folder / 'table.txt').write_text(text + '\n')
  (folder / 'compare.json').write_text(
    json.dumps({'config': json.loads(config.to_json()), 'results': summaries}, indent=1)
  )
  _picture_curves(summaries, config, task, folder / 'curves.png')
  first = folder / _OPTIMIZERS.value[0] / 'seed0'
  print(f'\n{text}\n')
  print(
    f'medians of {_SEEDS.value} seeds, {config.steps} steps each, mesh {config.mesh}; seconds are without compilation'
  )
  print(f'curves                 {folder / "curves.png"}')
  if config.task == 'reconstruct':
    print(f'reconstructions        {folder / "reconstructions.png"}')
  print(f'metrics, checkpoints   {first}')
  if _OPTIMIZERS.value[0] == 'kfac':
    print(f'what K-FAC covers      {first / "coverage.txt"}')
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  print('next: make train, make train-classifier, or one run with one thing changed:')
  print(f'  .venv/bin/python experiments/train.py --config={path} --config.kfac.damping=0.03 --workdir=runs/damping')


if __name__ == '__main__':
  launch(main, default_workdir='runs/compare')
