"""Scores classes known by WordNet's graph alone, against the graph with its nodes exchanged, and against chance.

python scripts/zero_shot.py --out=docs/graphs

Five sets of three Fashion-MNIST classes are held out in turn, each with several seeds. The two trainings of a seed
differ only in the graph. Intervals (95 %, by Student's t) are for the mean over sets of each set's mean over seeds,
because more seeds of a set tell nothing about other classes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import flags

from experiments.configs import zero_shot
from kronmesh import files
from kronmesh.train import jsonfile
from kronmesh.train.loop import train
from kronmesh.train.reporting.tables import columns, interval

OUT = flags.DEFINE_string('out', 'runs/zero_shot', 'Folder for zero_shot.json and zero_shot.txt.')
SEEDS = flags.DEFINE_integer('seeds', 3, 'Trainings of every set with each graph.', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 150, 'Of every training.', lower_bound=1)
HELD_OUT = ((0, 5, 8), (1, 4, 9), (2, 7, 8), (3, 6, 7), (4, 5, 6))
SCORES = ('zero_shot', 'harmonic', 'seen', 'unseen')


def trained(held_out: tuple[int, ...], seed: int, shuffled: bool) -> dict[str, float]:
  config = zero_shot.get_config()
  config.update({'steps': STEPS.value, 'eval_every': STEPS.value, 'seed': seed, 'keep_checkpoints': 0})
  config.update({'health_every': 0})
  config.data.update({'held_out': held_out, 'graph_shuffled': shuffled, 'graph_seed': seed})
  with tempfile.TemporaryDirectory() as folder:
    row = train(config, folder, quiet=True)[-1]
  return {k: row[f'eval_{k}'] for k in SCORES}


def table(results: list[dict[str, Any]]) -> str:
  sets = sorted({tuple(f['held_out']) for f in results})

  def means(shuffled: bool, score: str) -> np.ndarray:
    of = lambda held_out: [f[score] for f in results if (tuple(f['held_out']), f['shuffled']) == (held_out, shuffled)]  # noqa: E731
    return np.array([np.mean(of(held_out)) for held_out in sets])

  rows = []
  for score in SCORES:
    graph, other = means(False, score), means(True, score)
    rows.append([score, *map(interval, (graph, other, graph - other))])
  return columns(['percent', 'graph', 'shuffled graph', 'difference'], rows)


def measure() -> None:
  results = []
  for held_out in HELD_OUT:
    for seed in range(SEEDS.value):
      for shuffled in (False, True):
        results.append({'held_out': held_out, 'seed': seed, 'shuffled': shuffled, **trained(held_out, seed, shuffled)})
        print(results[-1], file=sys.stderr)
  print(table(results))
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  files.write(out / 'zero_shot.json', jsonfile.dumps(results, indent=1) + '\n')
  about = f'{len(HELD_OUT)} sets of 3 classes, {SEEDS.value} seeds; chance 33.3 of 3'
  files.write(out / 'zero_shot.txt', f'{about}\n\n{table(results)}\n')


if __name__ == '__main__':
  launch.command(measure, '--out=...')
