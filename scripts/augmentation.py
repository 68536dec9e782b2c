"""Measures how much augmentation, a GAN and a GAN with DiffAugment help a classifier with few labels.

python scripts/augmentation.py --workdir=runs/augmentation --out=docs/augmentation

The data are 100, 500 or 1,000 labelled images of Fashion-MNIST and nothing else. For each number and seed, one
classifier is trained on the images alone ('none'), one with shifts and mirrors ('classical'), and two with half of
every batch made by a GAN, trained without or with DiffAugment. The GAN has seen only the same labelled images, and the
classifier of 'none' filters its images. CAS is the accuracy of a classifier trained on generated images alone. All
accuracies are on the 10,000 real test images. Results with the same settings in --out's augmentation.jsonl are not
measured again: a second call goes on where the first ended, on the same machine or another.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from kronmesh import files
from scripts import few_labels

WORKDIR = launch.define_folder('workdir', 'runs/augmentation', 'Folder for all runs.')
OUT = flags.DEFINE_string('out', 'runs/augmentation', 'Folder for augmentation.jsonl and augmentation.txt.')
LABELS = flags.DEFINE_multi_integer('labels', [100, 500, 1000], 'How many images have labels.')
SEEDS = flags.DEFINE_integer('seeds', 5, 'Of labels, networks and noise.', lower_bound=2)
STEPS = flags.DEFINE_integer('steps', 300, 'Of a classifier.', lower_bound=1)
GAN_STEPS = flags.DEFINE_integer('gan_steps', 600, 'Of a GAN.', lower_bound=1)
SOURCE = flags.DEFINE_string('source', '', "Fashion-MNIST's folder, see --config.data.source.")


def measure() -> None:
  settings = few_labels.Settings(STEPS.value, GAN_STEPS.value, SOURCE.value)
  out = Path(OUT.value)
  path = out / 'augmentation.jsonl'
  for labels, seed in itertools.product(LABELS.value, range(SEEDS.value)):
    if (labels, seed) not in few_labels.read(path, settings):
      arms = few_labels.run(labels, seed, Path(WORKDIR.value) / f'{labels}_{seed}', settings)
      few_labels.add(path, settings, labels, seed, arms)
      print(labels, seed, arms, file=sys.stderr)
  table = few_labels.table(few_labels.read(path, settings))
  about = f'Means and their 95 % intervals; classifiers {STEPS.value} steps, GANs {GAN_STEPS.value}'
  files.write(out / 'augmentation.txt', f'{about}\n\n{table}\n')
  print(table)


if __name__ == '__main__':
  launch.command(measure, '--labels=...')
