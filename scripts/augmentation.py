"""Few labels: what classical augmentation, a GAN's images, and a GAN trained with DiffAugment are worth to a classifier.

python scripts/augmentation.py --workdir=runs/augmentation --out=docs/augmentation

Of Fashion-MNIST 100, 500 and 1,000 images have labels, and there are no others. With each number and seed a classifier is
trained on them ('none'), with shifts and mirrors ('classical'), and with half of every batch made by a GAN that has seen
the same labels alone, without DiffAugment or with it; its images are filtered by the classifier of 'none'. CAS is the
accuracy of a classifier of made images alone. All are on the 10,000 real test images. What augmentation.jsonl in --out has
of the same settings is not made again: a second call goes on where the first ended, there or on another machine.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiments.launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from experiments import few_labels

WORKDIR = experiments.launch.define_folder('workdir', 'runs/augmentation', 'Folder for all runs.')
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
  (out / 'augmentation.txt').write_text(f'{about}\n\n{table}\n')
  print(table)


if __name__ == '__main__':
  experiments.launch.command(measure, '--labels=...')
