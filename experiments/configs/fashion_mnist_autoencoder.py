"""The deep autoencoder 784-1000-500-250-30 on Fashion-MNIST by K-FAC, batch 4,096.

  python experiments/train.py --config=experiments/configs/fashion_mnist_autoencoder.py

Needs Debian's dataset-fashion-mnist, or its IDX files in a folder named by --config.data.source. Meant for a GPU; on
two cores a step takes seconds.
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import defaults


def get_config() -> ConfigDict:
  config = defaults()
  config.task = 'reconstruct'
  config.model = ConfigDict({'name': 'autoencoder', 'widths': (1000, 500, 250, 30)})
  config.data.name = 'fashion_mnist'
  config.data.batch_size = 4096
  config.data.eval_split = 'train'
  config.steps = 1500
  config.eval_every = 100
  config.kfac.inverses_every = 5
  return config
