"""Garments that nobody has made: a class-conditional BigGAN on Fashion-MNIST, with an optimiser for each player.

  kronmesh train --config=fashion_mnist_resnet:small --workdir=runs/judge
  kronmesh train --config=fashion_mnist_gan --config.gan.judge=runs/judge
  kronmesh train --config=fashion_mnist_gan --config.gan.generator=adam

The players are the generator and the discriminator. The report shows samples, a row for each class. With a judge (a
finished run of a classifier) the score is the agreement: the share of images to which the judge gives the class that
was asked for. Presets behind a colon: `small` (minutes on two cores), `full` (twice as wide, with attention: an hour on
one core). Needs Debian's dataset-fashion-mnist, or its IDX files in a folder named by --config.data.source.

Measured (Adam, on a CPU; docs/gan.md): agreement 0.82 after `small`'s 1,000 steps, 0.92 after `full`'s 4,500. K-FAC for
both players needs 0.38 to 0.56 of Adam's steps to the same agreement (width 4).
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


def get_config(preset: str = 'small') -> ConfigDict:
  choose(preset, ('small', 'full'))
  config = defaults()
  config.task = 'generate'
  small = preset == 'small'
  config.model = model('gan', size=28, channels=1, classes=10, width=8 if small else 16, latent=48, embedding=32)
  config.model.attention = not small
  config.data.update({'name': 'fashion_mnist', 'batch_size': 64, 'eval_batch_size': 400, 'eval_examples': 2000})
  config.steps = 1000 if small else 4500
  config.eval_every = 250 if small else 900
  config.recipe.average = 0.99 if small else 0.998
  config.optimizer = 'adam'
  config.adam.update({'learning_rate': 1e-3 if small else 5e-4, 'b1': 0.0, 'b2': 0.99, 'schedule': 'constant'})
  config.kfac.update({'learning_rate': 0.1, 'damping': 0.1, 'momentum': 0.0, 'schedule': 'constant'})
  config.kfac.update({'kl_clip': 0.01, 'subsample': 0.25, 'statistics_every': 10, 'inverses_every': 10})
  config.health_every = 0
  return config


def spaces() -> dict[str, dict[str, tuple[float, float]]]:
  """Returns the ranges in which kronmesh compare tries the same number of settings for each optimiser.

  Two players need smaller rates than a classifier.
  """
  return {
    'kfac': {'damping': (0.01, 1.0), 'kl_clip': (1e-3, 0.1)},
    'adam': {'learning_rate': (3e-4, 5e-3), '1-b2': (3e-3, 0.1)},
    'muon': {'learning_rate': (1e-3, 0.05), '1-momentum': (0.03, 0.3)},
  }
