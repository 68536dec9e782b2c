"""A protocol that measures how much augmentation, a GAN and a GAN with DiffAugment help with few labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.configs import fashion_mnist_gan, fashion_mnist_resnet
from kronmesh import data, files
from kronmesh.tasks.gan import generated
from kronmesh.train import jsonfile
from kronmesh.train.checkpoints import load_export
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.reporting.tables import columns, interval
from kronmesh.train.runtime.workdir import check_same, evaluations

ARMS = ('none', 'classical', 'GAN', 'GAN + DiffAugment')
POLICY = ('translation', 'cutout')

Arms = dict[str, dict[str, float]]  # by arm: 'accuracy', and 'CAS' for arms with a GAN
Found = dict[tuple[int, int], Arms]  # by labels and seed


class Settings(NamedTuple):
  """The steps of the classifiers and of the GANs, and Fashion-MNIST's folder ('' for Debian's)."""

  steps: int
  gan_steps: int
  source: str = ''

  def told(self) -> dict[str, int]:
    return {'steps': self.steps, 'gan_steps': self.gan_steps}


def classifier(labels: int, seed: int, arm: str, settings: Settings) -> Any:
  """Returns the config of a classifier that is trained on `labels` labelled images."""
  config, batch = fashion_mnist_resnet.get_config('small'), min(max(labels // 32 * 32, 8), 128)  # on up to 8 devices
  config.model.width = 16
  config.data.update({'source': settings.source, 'train_examples': labels, 'batch_size': batch})
  config.data.update({'eval_batch_size': 1000, 'eval_examples': 0, 'augment': arm == 'classical'})
  config.update({'seed': seed, 'steps': settings.steps, 'eval_every': settings.steps, 'keep_checkpoints': 1})
  config.health_every = 0
  return config


def gan(labels: int, seed: int, policy: tuple[str, ...], settings: Settings) -> Any:
  """Returns the config of a GAN that sees the same images as the classifiers."""
  config = fashion_mnist_gan.get_config('small')
  config.data.update({'source': settings.source, 'train_examples': labels})
  config.update({'seed': seed, 'steps': settings.gan_steps, 'eval_every': settings.gan_steps, 'keep_checkpoints': 1})
  config.gan.augment = policy
  return config


def trained(config: Any, where: Path) -> float | None:
  """Trains a config unless its run is already in the folder, and returns the accuracy if it is a classifier.

  Raises:
    ConfigError: the folder holds the run of another config.
  """
  check_same(config, where)
  rows = evaluations(where) if (where / 'export').exists() else train(config, where, quiet=True)
  return rows[-1].get('eval_accuracy')


def classified(made: data.Arrays, test: data.Arrays, folder: Path, steps: int, seed: int = 0) -> float:
  """Trains a convolutional network on these images and returns its accuracy on the test images.

  The folder gets the arrays and the run.
  """
  data.write_arrays(made, folder / 'arrays/train.npz')
  data.write_arrays(test, folder / 'arrays/test.npz')
  config = fashion_mnist_resnet.get_config('small')
  config.model.width = 16
  config.data.update({'name': 'arrays', 'source': str(folder / 'arrays'), 'batch_size': min(256, len(made.label))})
  config.data.update({'eval_batch_size': 1000, 'eval_examples': 0})
  config.update({'steps': steps, 'eval_every': steps, 'seed': seed, 'keep_checkpoints': 0, 'health_every': 0})
  return train(config, folder / 'run', quiet=True)[-1]['eval_accuracy']


def run(labels: int, seed: int, where: Path, settings: Settings) -> Arms:
  """Runs all arms with the same labelled images and returns their accuracies, and CAS for arms with a GAN.

  Runs that the folder already holds go on.
  """
  where = where / f'{settings.steps}_{settings.gan_steps}'  # `check_same` ignores a run's length
  results = {arm: {'accuracy': trained(classifier(labels, seed, arm, settings), where / arm)} for arm in ARMS[:2]}
  test = data.load_arrays('fashion_mnist', 'test', source=settings.source)
  for arm, policy in zip(ARMS[2:], ((), POLICY), strict=True):
    made_by = where / f'network of {arm}'
    trained(gan(labels, seed, policy, settings), made_by)
    config = classifier(labels, seed, arm, settings)
    config.generated.update({'run': str(made_by), 'judge': str(where / 'none'), 'share': 0.5, 'keep': 0.5})
    results[arm] = {'accuracy': trained(config, where / arm)}
    alone = where / f'alone of {arm}'
    if not (alone / 'run/export').exists():
      images = generated.images(generated.read_generator(made_by), 10000, seed)
      classified(images, test, alone, settings.steps, seed)
    results[arm]['CAS'] = load_export(alone / 'run/export')[1]['scores']['accuracy']
  return results


def read(path: Path, settings: Settings) -> Found:
  """Reads the earlier results with these settings.

  Raises:
    ConfigError: the file holds results with other settings.
  """
  rows = jsonfile.read_lines(path).rows
  for row in rows:
    if row['settings'] != settings.told():
      raise ConfigError(
        f'{path} holds what was measured with {row["settings"]}, not {settings.told()}; name another --out'
      )
  return {(row['labels'], row['seed']): row['arms'] for row in rows}


def add(path: Path, settings: Settings, labels: int, seed: int, arms: Arms) -> None:
  """Adds one line in a single write, because calls with other labels may write to the same file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  row = {'settings': settings.told(), 'labels': labels, 'seed': seed, 'arms': arms}
  files.append_lines(path, [jsonfile.dumps(row)], sync=True)


def table(results: Found) -> str:
  """Formats the results for all numbers of labels with at least two seeds. Differences are within a seed."""
  rows = []
  for labels in sorted({labels for labels, _ in results}):
    arms_of = [arms for (number, _), arms in sorted(results.items()) if number == labels]
    if len(arms_of) < 2:
      continue
    classical = np.array([o['classical']['accuracy'] for o in arms_of])
    for arm in ARMS:
      accuracy = np.array([o[arm]['accuracy'] for o in arms_of])
      cas = interval(np.array([o[arm]['CAS'] for o in arms_of])) if 'CAS' in arms_of[0][arm] else ''
      beside = interval(accuracy - classical) if arm != 'classical' else ''
      rows.append([labels, len(arms_of), arm, interval(accuracy), beside, cas])
  return columns(['labels', 'seeds', 'images', 'accuracy, percent', 'less classical', 'CAS'], rows)
