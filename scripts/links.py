"""Compares link prediction by K-FAC, Adam and pykeen, with the same model, width, batches and number of steps.

python scripts/links.py --pykeen=/path/to/python --out=docs/graphs

Every method tries the same number of settings on the validation split, and then runs with the same number of seeds on
the test split. pykeen runs in a separate Python (`python -m venv there; there/bin/pip install pykeen`), and is left out
without one.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import flags

from experiments.configs import links
from kronmesh import data, files
from kronmesh.train import jsonfile
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.reporting.tables import columns

PYKEEN = flags.DEFINE_string('pykeen', None, 'A Python that has pykeen; without one its rows are left out.')
OUT = flags.DEFINE_string('out', 'runs/links', 'Folder for links.json and links.txt.')
PRESETS = flags.DEFINE_list('presets', list(links.PRESETS[:4]), 'Of experiments/configs/links.py.')
STEPS = flags.DEFINE_integer('steps', 600, 'Of every training.', lower_bound=10)
SEEDS = flags.DEFINE_integer('seeds', 3, 'Trainings with the settings chosen.', lower_bound=1)
SETTINGS = {
  'kfac': [{'damping': d} for d in (3e-3, 1e-2, 3e-2, 1e-1)],
  'adam': [{'learning_rate': r} for r in (1e-2, 3e-2, 1e-1, 3e-1)],
  'pykeen': [{'rate': r} for r in (1e-2, 3e-2, 1e-1, 3e-1)],
}


def ours(preset: str, optimizer: str, setting: dict[str, float], seed: int, split: str) -> dict[str, float]:
  config = links.get_config(preset)
  config.update({'optimizer': optimizer, 'steps': STEPS.value, 'eval_every': STEPS.value, 'seed': seed})
  config.update({'keep_checkpoints': 0, 'health_every': 0, 'log_every': STEPS.value})
  config[optimizer].update(setting)
  config.data.eval_split = split
  with tempfile.TemporaryDirectory() as folder:
    row = train(config, folder, quiet=True)[-1]
  return {k.removeprefix('eval_'): row[k] for k in ('eval_mrr', 'eval_hits1', 'eval_hits10', 'seconds')}


class Pykeen:
  """A process that runs pykeen's trainings one after another."""

  def __init__(self, python: str):
    command = [python, str(Path(__file__).parent / 'pykeen_links.py')]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

  def __call__(self, preset: str, setting: dict[str, float], seed: int, split: str) -> dict[str, float]:
    config = links.get_config(preset)
    data.load_triples(config.data.name)  # fetches it
    folder = data.data_dir() / 'triples' / config.data.name
    # An epoch of pykeen goes over the pairs (node, relation), each with all of its other ends.
    pairs = {(s, r) for s, r, _ in data.read_triples(folder / 'train.txt')}
    inverse = {(t, r) for _, r, t in data.read_triples(folder / 'train.txt')}
    epochs = math.ceil(STEPS.value / math.ceil((len(pairs) + len(inverse)) / config.data.batch_size))
    wanted = {'folder': str(folder), 'decoder': config.model.decoder, 'width': config.model.width, 'epochs': epochs}
    wanted |= {'batch': config.data.batch_size, 'seed': seed, 'split': split, **setting}
    self.process.stdin.write(jsonfile.dumps(wanted) + '\n')
    self.process.stdin.flush()
    answer = self.process.stdout.readline()
    if not answer:
      raise ConfigError(f'--pykeen={PYKEEN.value} ended; does it have pykeen?')
    return json.loads(answer)


def measured(preset: str, methods: dict[str, Any]) -> dict[str, Any]:
  by_method = {}
  for name, run in methods.items():
    tried = [{'setting': s, **run(preset, s, 0, 'valid')} for s in SETTINGS[name]]
    best = max(tried, key=lambda t: t['mrr'])['setting']
    tests = [run(preset, best, seed, 'test') for seed in range(1, SEEDS.value + 1)]
    by_method[name] = {'setting': best, 'tried': tried, 'tests': tests}
    print(f'{preset} {name}: {best}, MRR {np.mean([t["mrr"] for t in tests]):.3f}', file=sys.stderr)
  return by_method


def measure() -> None:
  methods: dict[str, Any] = {
    name: lambda preset, setting, seed, split, name=name: ours(preset, name, setting, seed, split)
    for name in ('kfac', 'adam')
  }
  if PYKEEN.value:
    methods['pykeen'] = Pykeen(PYKEEN.value)
  results = {preset: measured(preset, methods) for preset in PRESETS.value}
  rows = []
  for preset, by_method in results.items():
    for name, tests in by_method.items():
      of = lambda key, tests=tests: [t[key] for t in tests['tests']]  # noqa: E731
      mrr = of('mrr')
      scores = [f'{100 * np.mean(of(k)):.1f}' for k in ('hits1', 'hits10')]
      rows.append([preset, name, f'{100 * np.mean(mrr):.1f}', f'{100 * min(mrr):.1f} to {100 * max(mrr):.1f}', *scores,
                   f'{np.mean(of("seconds")):.1f}', jsonfile.dumps(tests['setting'])])  # fmt: skip
  table = columns(['set and model', 'by', 'MRR', 'seeds', 'hits@1', 'hits@10', 'seconds', 'chosen'], rows)
  print(table)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  files.write(out / 'links.json', jsonfile.dumps({'steps': STEPS.value, 'found': results}, indent=1) + '\n')
  files.write(out / 'links.txt', f'{STEPS.value} steps of 512, filtered, {SEEDS.value} seeds, percent\n\n{table}\n')


if __name__ == '__main__':
  launch.command(measure, '--presets=...')
