"""Few labels: what classical augmentation, a GAN's images, and a GAN trained with DiffAugment are worth to a classifier.

python scripts/augmentation.py --workdir=runs/augmentation --out=docs/augmentation

Of Fashion-MNIST 100, 500 and 1,000 images have labels, and there are no others. With each number and seed a classifier is
trained on them ('none'), with shifts and mirrors ('classical'), and with half of every batch made by a GAN that has seen
the same labels alone, without DiffAugment or with it; its images are filtered by the classifier of 'none'. CAS is the
accuracy of a classifier of made images alone. All are on the 10,000 real test images. A second call goes on where the
first ended.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiments.launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import numpy as np
from absl import app, flags, logging
from scipy import stats

from experiments import folder, generated
from experiments.checkpoints import load_export
from experiments.configs import fashion_mnist_gan, fashion_mnist_resnet
from experiments.errors import MISTAKE, ConfigError
from experiments.tables import columns
from experiments.train import train
from kronmesh import data

WORKDIR = flags.DEFINE_string('workdir', 'runs/augmentation', 'Folder for all runs.')
OUT = flags.DEFINE_string('out', 'runs/augmentation', 'Folder for augmentation.json and augmentation.txt.')
LABELS = flags.DEFINE_multi_integer('labels', [100, 500, 1000], 'How many images have labels.')
SEEDS = flags.DEFINE_integer('seeds', 5, 'Of labels, networks and noise.', lower_bound=2)
STEPS = flags.DEFINE_integer('steps', 300, 'Of a classifier.', lower_bound=1)
GAN_STEPS = flags.DEFINE_integer('gan_steps', 1000, 'Of a GAN.', lower_bound=1)
SOURCE = flags.DEFINE_string('source', '', "Fashion-MNIST's folder, see --config.data.source.")
ARMS = ('none', 'classical', 'GAN', 'GAN + DiffAugment')
POLICY = ('translation', 'cutout')


def classifier(labels: int, seed: int, arm: str) -> Any:
  config = fashion_mnist_resnet.get_config('small')
  config.model.width = 16
  config.data.update({'source': SOURCE.value, 'train_examples': labels, 'batch_size': min(labels, 128)})
  config.data.update({'eval_batch_size': 1000, 'eval_examples': 0, 'augment': arm == 'classical'})
  config.update({'seed': seed, 'steps': STEPS.value, 'eval_every': STEPS.value, 'keep_checkpoints': 1})
  config.health_every = 0
  return config


def gan(labels: int, seed: int, policy: tuple[str, ...]) -> Any:
  config = fashion_mnist_gan.get_config('small')
  config.data.update({'source': SOURCE.value, 'train_examples': labels})
  config.update({'seed': seed, 'steps': GAN_STEPS.value, 'eval_every': GAN_STEPS.value, 'keep_checkpoints': 1})
  config.gan.augment = policy
  return config


def trained(config: Any, where: Path) -> float | None:
  """Of a run that is there already, or of a new one: its accuracy, if it is a classifier's."""
  rows = folder.evaluations(where) if (where / 'export').exists() else train(config, where, quiet=True)
  return rows[-1].get('eval_accuracy')


def of(labels: int, seed: int) -> dict[str, dict[str, float]]:
  """Accuracies of all arms, and CAS of those with a GAN."""
  where = Path(WORKDIR.value) / f'{labels}_{seed}'
  found = {arm: {'accuracy': trained(classifier(labels, seed, arm), where / arm)} for arm in ARMS[:2]}
  test = data.load_arrays('fashion_mnist', 'test', source=SOURCE.value)
  for arm, policy in zip(ARMS[2:], ((), POLICY), strict=True):
    made_by = where / f'network of {arm}'
    trained(gan(labels, seed, policy), made_by)
    config = classifier(labels, seed, arm)
    config.generated.update({'run': str(made_by), 'judge': str(where / 'none'), 'share': 0.5, 'keep': 0.5})
    found[arm] = {'accuracy': trained(config, where / arm)}
    alone = where / f'alone of {arm}'
    if not (alone / 'run/export').exists():
      images = generated.images(generated.read_generator(made_by), 10000, seed)
      generated.classified(images, test, alone, STEPS.value, seed)
    found[arm]['CAS'] = load_export(alone / 'run/export')[1]['scores']['accuracy']
  return found


def interval(values: np.ndarray) -> str:
  """Mean and the 95 % interval of it, by Student's t."""
  half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
  return f'{100 * values.mean():.1f} +- {100 * half:.1f}'


def measure() -> None:
  found = {}
  for labels, seed in itertools.product(LABELS.value, range(SEEDS.value)):
    found[labels, seed] = of(labels, seed)
    print(labels, seed, found[labels, seed], file=sys.stderr)
  rows = []
  for labels in LABELS.value:
    own = [found[labels, seed] for seed in range(SEEDS.value)]
    classical = np.array([o['classical']['accuracy'] for o in own])
    for arm in ARMS:
      accuracy = np.array([o[arm]['accuracy'] for o in own])
      cas = interval(np.array([o[arm]['CAS'] for o in own])) if 'CAS' in own[0][arm] else ''
      beside = interval(accuracy - classical) if arm != 'classical' else ''
      rows.append([labels, arm, interval(accuracy), beside, cas])
  table = columns(['labels', 'images', 'accuracy, percent', 'less classical', 'CAS'], rows)
  print(table)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  about = f'{SEEDS.value} seeds, 95 % intervals; classifiers {STEPS.value} steps, GANs {GAN_STEPS.value}'
  (out / 'augmentation.txt').write_text(f'{about}\n\n{table}\n')
  kept = [{'labels': labels, 'seed': seed, 'arms': arms} for (labels, seed), arms in found.items()]
  (out / 'augmentation.json').write_text(json.dumps(kept, indent=1) + '\n')


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.ERROR)
  try:
    if len(argv) > 1:
      raise ConfigError(f'{argv[1]!r} is no flag; write --labels=...')
    measure()
  except (ConfigError, data.DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(MISTAKE)


if __name__ == '__main__':
  app.run(main)
