"""The deep autoencoder 784-1000-500-250-30 on Fashion-MNIST by K-FAC, batch 4,096.

  kronmesh train --config=fashion_mnist_autoencoder
  kronmesh compare --config=fashion_mnist_autoencoder:small --trials=4

Presets behind a colon: `full` (meant for a GPU: on two cores a step takes a second), `small` (a narrower network,
minutes on two cores), `whole` and `whole_small` (full batches of 60,000). Needs Debian's dataset-fashion-mnist, or its
IDX files in a folder named by --config.data.source.

Measured (`small`, two cores; docs/convergence.md): adaptive K-FAC reaches error 8.87 after 72 steps; that is the best
error of Muon in 200 steps. `full` has not been measured: it is open until there is a GPU.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


def get_config(preset: str = 'full') -> ConfigDict:
  choose(preset, ('full', 'small', 'whole', 'whole_small'))
  config = defaults()
  config.task = 'reconstruct'
  config.model = model('autoencoder', widths=(1000, 500, 250, 30))
  config.data.name = 'fashion_mnist'
  config.data.batch_size = 4096
  config.data.eval_split = 'train'
  config.data.eval_examples = 4096
  config.steps = 1500
  config.eval_every = 10
  config.log_every = 10
  config.target = 3.58  # the squared error that Muon reached in 1,500 steps on one H100
  config.kfac.subsample = 1 / 4
  # Averages over fifty steps or more lose nothing and are less noisy than fresh statistics.
  config.adaptive_kfac.update({'damping': 0.1, 'statistics_every': 5, 'inverses_every': 5})
  if preset.endswith('small'):
    config.model.widths = (256, 128, 64, 20)
    config.steps = 200
    config.eval_every = 4
    config.target = 8.87  # the best error that Muon reaches in these steps
  if preset.startswith('whole'):
    config.data.batch_size = 60_000
  if preset == 'whole_small':
    config.steps, config.eval_every, config.log_every = 40, 1, 1
    config.target = 20.0
    # Chosen by five trials each at batch 4,096. In so few steps Muon does better at a rate of 0.2: docs/convergence.md.
    config.adaptive_kfac.update({'damping': 0.00237, 'damping_rate': 0.9334})
    config.muon.update({'learning_rate': 0.0533, 'momentum': 0.82})
  return config
