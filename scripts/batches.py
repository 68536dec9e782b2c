"""Measures how far a batch may grow before examples are wasted: a table and a plot of the examples to a target.

python scripts/batches.py --config=fashion_mnist_resnet:small --trials=4 --workdir=runs/batches

At every batch size, each optimiser gets the same number of trials with the same number of examples, and then runs with
several seeds. All runs end at the target. A second call goes on where the first stopped.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import matplotlib
from absl import flags

from kronmesh import files
from kronmesh.commands.compare import OPTIMIZERS_FLAG, SEEDS, TRIALS, compare, median
from kronmesh.commands.palette import colours
from kronmesh.train import jsonfile
from kronmesh.train.build import check_target
from kronmesh.train.errors import ConfigError
from kronmesh.train.optimizers import SECOND_ORDER
from kronmesh.train.reporting.tables import columns
from kronmesh.train.sweeps.variants import member

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter, NullLocator

_BATCHES = flags.DEFINE_list('batches', ['256', '1024', '4096', '16384'], 'Batches, the smallest first.')
_EXAMPLES = flags.DEFINE_integer('examples', 240_000, 'The budget of every run.', lower_bound=1)
_ALLOWED = 1.5  # the most examples that are not wasteful, over those of the smallest batch


def configure(config: Any, batch: int, examples: int) -> Any:
  """Returns the config for another batch size.

  A run evaluates about a hundred times within its budget, or after every step if batches are large. Statistics and
  inverses are renewed after the same number of examples as in the config, or at every step if batches are large.
  """
  variant = copy.deepcopy(config)
  for name in SECOND_ORDER:
    for interval in ('statistics_every', 'inverses_every'):
      variant[name][interval] = max(1, round(variant[name][interval] * config.data.batch_size / batch))
  variant.data.batch_size, variant.steps, variant.stop_at_target = batch, max(1, examples // batch), True
  variant.eval_every = variant.log_every = max(1, variant.steps // 100)
  return variant


def largest_batch(examples: dict[int, float | None]) -> int | None:
  """Returns the largest batch up to which the examples stay within 1.5 times those of the smallest batch.

  It returns None if the smallest batch did not reach the target.
  """
  base, critical = examples[min(examples)], None
  for batch in sorted(examples):
    if base is None or examples[batch] is None or examples[batch] > _ALLOWED * base:
      break
    critical = batch
  return critical


def table(examples_by_name: dict[str, dict[int, float | None]]) -> str:
  """Formats each optimiser's median examples to the target at every batch, and its largest batch without waste."""
  batches = list(next(iter(examples_by_name.values())))
  rows = [
    [name, *['-' if of[b] is None else f'{of[b]:,.0f}' for b in batches], largest_batch(of) or '-']
    for name, of in examples_by_name.items()
  ]
  return columns(['optimiser', *[f'batch {b}' for b in batches], f'within {_ALLOWED} x up to'], rows)


def picture(examples_by_name: dict[str, dict[int, float | None]], title: str, path: Path) -> None:
  """Plots the examples to the target over the batch, on logarithmic scales, with a dotted limit for each optimiser."""
  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  colour_of = colours(list(examples_by_name))
  for name, of in examples_by_name.items():
    known = {b: n for b, n in of.items() if n is not None}
    axes.plot(list(known), list(known.values()), marker='o', color=colour_of[name], label=name)
    if of[min(of)] is not None:
      axes.axhline(_ALLOWED * of[min(of)], color=colour_of[name], linestyle=':', linewidth=0.9)
  reached = any(n is not None for of in examples_by_name.values() for n in of.values())
  title = title if reached else f'{title}: not reached'
  scale = 'log' if reached else 'linear'  # without points a logarithmic scale fails
  axes.set(xscale='log', yscale=scale, xlabel='batch', ylabel='examples to the target', title=title)
  axes.set_xticks(list(next(iter(examples_by_name.values()))), [str(b) for b in next(iter(examples_by_name.values()))])
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
  axes.grid(alpha=0.3)
  axes.plot([], [], color='grey', linestyle=':', label=f'{_ALLOWED} x the examples of the smallest batch')
  axes.legend(frameon=False)
  with files.replacing(path) as file:
    figure.savefig(file, dpi=130, format='png')
  plt.close(figure)


def main(config: Any, workdir: str) -> None:
  try:
    batches = sorted({int(b) for b in _BATCHES.value})
  except ValueError as error:
    raise ConfigError(f'--batches={",".join(_BATCHES.value)} must be whole numbers') from error
  check_target(config)
  members = OPTIMIZERS_FLAG.value
  for name in members:
    member(config, name)
  folder, examples_by_name, told = Path(workdir), {name: {} for name in members}, []
  for batch in batches:
    variant = configure(config, batch, _EXAMPLES.value)
    for summary in compare(variant, folder / f'batch{batch}', members, SEEDS.value, TRIALS.value):
      reached = summary['targets'][f'{config.target:g}']
      examples_by_name[summary['optimizer']][batch] = median([row and row['examples'] for row in reached])
      told.append({'batch': batch, **summary})
  text = table(examples_by_name)
  files.write(folder / 'table.txt', text + '\n')
  files.write(folder / 'batches.json', jsonfile.dumps({'config': json.loads(config.to_json()), 'runs': told}, indent=1))
  title = f'{config.model.name} on {config.data.name}, target {config.target:g}'
  picture(examples_by_name, title, folder / 'batches.png')
  print(f'\n{text}\n\nmedians of {SEEDS.value} seeds, {TRIALS.value} trials for each batch and optimiser')
  print(f'plot   {folder / "batches.png"}')


if __name__ == '__main__':
  launch(main, default_workdir='runs/batches')
