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

from experiments.errors import ConfigError
from experiments.optimizers import OPTIMIZERS
from experiments.train import Run, build, first_at_target, restore, train

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import orbax.checkpoint as ocp

_OPTIMIZERS = flags.DEFINE_list('optimizers', list(OPTIMIZERS), 'The optimisers to compare.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'How many seeds each optimiser runs with.', lower_bound=1)


def compare(config: Any, workdir: Path, optimizers: list[str], seeds: int) -> list[dict[str, Any]]:
  """Trains all members, seed by seed over one compiled program, and returns one summary for each optimiser."""
  summaries = []
  for name in optimizers:
    own = copy.deepcopy(config)
    own.optimizer = name
    run = build(own)
    curves = []
    for seed in range(seeds):
      own.seed = seed
      folder = workdir / name / f'seed{seed}'
      rows = train(own, folder, run=run)
      curves.append(rows or _logged(folder))
    summaries.append(summarise(name, run, curves))
    if config.task == 'reconstruct' and name == optimizers[0]:
      _picture_reconstructions(own, run, workdir / name / 'seed0', workdir / 'reconstructions.png')
  return summaries


def _logged(folder: Path) -> list[dict[str, float]]:
  """The evaluations of a run that was complete already."""
  rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  return [row for row in rows if 'seconds' in row]


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


def table(summaries: list[dict[str, Any]], target: float, metric: str) -> str:
  """One row for each optimiser, and its steps as a multiple of the first one's."""
  head = (
    'optimiser',
    f'steps to {metric} {target:g}',
    '(of each seed)',
    'x first',
    'seconds',
    f'final {metric}',
    'ms a step',
  )
  rows, base = [head], summaries[0]['steps_to_target']
  for s in summaries:
    steps = s['steps_to_target']
    rows.append((
      s['optimizer'],
      'not reached' if steps is None else f'{steps:g}',
      ' '.join('-' if n is None else str(n) for n in s['steps_by_seed']),
      '-' if not (steps and base) else f'{steps / base:.2f}',
      '-' if s['seconds_to_target'] is None else f'{s["seconds_to_target"]:.1f}',
      f'{s["final"]:.4g}',
      f'{s["ms_per_step"]:.1f}',
    ))  # fmt: skip
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def _picture_curves(summaries: list[dict[str, Any]], config: Any, metric: str, lower: bool, path: Path) -> None:
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained', sharey=True)
  for i, s in enumerate(summaries):
    for j, curve in enumerate(s['curves']):
      steps, seconds, values = np.asarray(curve).T
      for axis, x in zip(axes, (steps, seconds), strict=True):
        axis.plot(x, values, color=f'C{i}', alpha=0.8, linewidth=1.3, label=s['optimizer'] if j == 0 else None)
  for axis, label in zip(axes, ('step', 'seconds of training on this machine'), strict=True):
    axis.axhline(config.target, color='black', linewidth=0.8, linestyle=':')
    axis.set_xlabel(label)
    axis.set_yscale('log' if lower else 'linear')
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(f'{metric} ({config.data.eval_split})')
  axes[0].annotate('target', (0, config.target), xytext=(2, 3), textcoords='offset points', fontsize=8)
  axes[0].legend(frameon=False)
  figure.suptitle(f'{config.model.name} on {config.data.name}, batch {config.data.batch_size}, mesh {config.mesh}')
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _picture_reconstructions(config: Any, run: Run, folder: Path, path: Path, n: int = 12) -> None:
  with ocp.CheckpointManager((folder / 'checkpoints').absolute()) as checkpoints:
    state = restore(run, checkpoints)
  batch = next(run.eval_batches())
  logits = run.task.model.apply({'params': jax.device_get(state.params)}, np.asarray(batch['image']))
  given = np.asarray(batch['image'])[:n, ..., 0]
  made = np.asarray(jax.nn.sigmoid(logits))[:n].reshape(given.shape)
  figure, axes = plt.subplots(2, n, figsize=(n * 0.8, 2), layout='constrained')
  for row, images in zip(axes, (given, made), strict=True):
    for axis, image in zip(row, images, strict=True):
      axis.imshow(image, cmap='gray_r', vmin=0, vmax=1)
      axis.set_xticks([])
      axis.set_yticks([])
  axes[0, 0].set_ylabel('image')
  axes[1, 0].set_ylabel(config.optimizer)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main(config: Any, workdir: str) -> None:
  folder = Path(workdir)
  unknown = sorted(set(_OPTIMIZERS.value) - set(OPTIMIZERS))
  if unknown:
    raise ConfigError(f'--optimizers: {unknown[0]!r} is unknown; choose from {", ".join(OPTIMIZERS)}')
  summaries = compare(config, folder, _OPTIMIZERS.value, _SEEDS.value)
  lower = config.task == 'reconstruct'
  metric = 'error' if lower else 'accuracy'
  text = table(summaries, config.target, metric)
  (folder / 'table.txt').write_text(text + '\n')
  (folder / 'compare.json').write_text(
    json.dumps({'config': json.loads(config.to_json()), 'results': summaries}, indent=1)
  )
  _picture_curves(summaries, config, metric, lower, folder / 'curves.png')
  print(f'\n{text}\n\nmedians of {_SEEDS.value} seeds, {config.steps} steps, mesh {config.mesh}')
  print(f'curves: {folder / "curves.png"}')
  if lower:
    print(f'reconstructions: {folder / "reconstructions.png"}')
  first = folder / _OPTIMIZERS.value[0] / 'seed0'
  print(f'coverage, metrics and checkpoints: {first}' if _OPTIMIZERS.value[0] == 'kfac' else f'metrics: {first}')
  print('next: make train-classifier; or change one thing: python experiments/train.py '
        '--config=experiments/configs/digits.py --config.kfac.damping=0.3 --workdir=runs/damping')  # fmt: skip


if __name__ == '__main__':
  launch(main, default_workdir='runs/compare')
