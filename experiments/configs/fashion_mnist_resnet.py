"""A small ResNet on Fashion-MNIST by K-FAC, batch 512, data-parallel over what devices there are.

  python experiments/train.py --config=experiments/configs/fashion_mnist_resnet.py

Needs Debian's dataset-fashion-mnist, or its IDX files in a folder named by --config.data.source.
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import defaults


def get_config() -> ConfigDict:
  config = defaults()
  config.model = ConfigDict(
    {'name': 'resnet', 'blocks': (1, 1, 1), 'classes': 10, 'width': 16, 'bottleneck': False, 'stem': 'small'}
  )
  config.model.dtype = 'float32'
  config.data.name = 'fashion_mnist'
  config.data.batch_size = 512
  config.data.augment = True
  config.steps = 600
  config.eval_every = 100
  config.kfac.weight_decay = 1e-3
  config.kfac.statistics_every = 10
  config.kfac.inverses_every = 10
  return config
