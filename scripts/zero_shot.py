"""Classes without images, known by WordNet's graph alone, beside the same with its nodes exchanged, and chance.

python scripts/zero_shot.py --out=docs/graphs

Five sets of three classes of Fashion-MNIST are held out in turn, each with several seeds; a seed's two trainings differ in
the graph alone, and intervals are of the means over all of them (bootstrap, 95 %).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiments.launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import app, flags, logging

from experiments.configs import zero_shot
from experiments.tables import columns
from experiments.train import train

OUT = flags.DEFINE_string('out', 'runs/zero_shot', 'Folder for zero_shot.json and zero_shot.txt.')
SEEDS = flags.DEFINE_integer('seeds', 3, 'Trainings of every set with each graph.', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 150, 'Of every training.', lower_bound=1)
HELD_OUT = ((0, 5, 8), (1, 4, 9), (2, 7, 8), (3, 6, 7), (4, 5, 6))
SCORES = ('zero_shot', 'harmonic', 'seen', 'unseen')


def trained(held_out: tuple[int, ...], seed: int, shuffled: bool) -> dict[str, float]:
  config = zero_shot.get_config()
  config.update({'steps': STEPS.value, 'eval_every': STEPS.value, 'seed': seed, 'keep_checkpoints': 0})
  config.update({'health_every': 0})
  config.data.update({'held_out': held_out, 'graph_shuffled': shuffled})
  with tempfile.TemporaryDirectory() as folder:
    row = train(config, folder, quiet=True)[-1]
  return {k: row[f'eval_{k}'] for k in SCORES}


def interval(values: np.ndarray) -> tuple[float, float]:
  """Of the mean, by bootstrap."""
  drawn = np.random.default_rng(0).choice(values, (10000, len(values))).mean(1)
  return tuple(np.percentile(drawn, [2.5, 97.5]))


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  experiments.launch.use_cache()
  found = []
  for held_out in HELD_OUT:
    for seed in range(SEEDS.value):
      for shuffled in (False, True):
        found.append({'held_out': held_out, 'seed': seed, 'shuffled': shuffled, **trained(held_out, seed, shuffled)})
        print(found[-1], file=sys.stderr)
  of = lambda shuffled, score: np.array([f[score] for f in found if f['shuffled'] == shuffled])  # noqa: E731
  rows = []
  for score in SCORES:
    graph, other = of(False, score), of(True, score)
    between = [f'{100 * low:.1f} to {100 * high:.1f}' for low, high in map(interval, (graph, other, graph - other))]
    means = [f'{100 * v.mean():.1f}' for v in (graph, other, graph - other)]
    rows.append([score, *(f'{m} ({b})' for m, b in zip(means, between, strict=True))])
  table = columns(['percent', 'graph', 'shuffled graph', 'difference'], rows)
  print(table)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'zero_shot.json').write_text(json.dumps(found, indent=1) + '\n')
  about = f'{len(HELD_OUT)} sets of 3 classes, {SEEDS.value} seeds; chance 33.3 of 3'
  (out / 'zero_shot.txt').write_text(f'{about}\n\n{table}\n')


if __name__ == '__main__':
  app.run(main)
