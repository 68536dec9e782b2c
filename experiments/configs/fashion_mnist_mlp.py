"""A multilayer perceptron 784-256-128-10 on Fashion-MNIST by K-FAC: how far can the batch grow?

  kronmesh train --config=fashion_mnist_mlp
  python scripts/batches.py --config=fashion_mnist_mlp --trials=4

The network is small enough to try many batch sizes on two cores. Needs Debian's dataset-fashion-mnist, or its IDX files
in a folder named by --config.data.source.

Measured (two cores; docs/convergence.md): K-FAC reaches accuracy 0.85 after 33,792 examples at batch 1,024, and after
163,840 at batch 16,384, where SGD, Adam and Muon do not reach it within 400,000.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import defaults, model


def get_config() -> ConfigDict:
  config = defaults()
  config.model = model('mlp', hidden=(256, 128), classes=10, activation='tanh')
  config.data.name = 'fashion_mnist'
  config.data.batch_size = 1024
  config.data.eval_batch_size = 10_000
  config.steps = 600
  config.eval_every = 20
  config.target = 0.85
  config.kfac.update({'learning_rate': 0.3, 'damping': 0.01, 'momentum': 0.6})
  return config
