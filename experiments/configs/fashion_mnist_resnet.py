"""A small ResNet on Fashion-MNIST by K-FAC, with batches from 256 to 16,384, data-parallel over all devices.

  kronmesh train --config=fashion_mnist_resnet
  python scripts/batches.py --config=fashion_mnist_resnet:small --trials=3

Presets behind a colon: `full` (30 epochs of a ResNet-8; a GPU), `small` (half as wide, strided in its first layer,
minutes on two cores), `large` (the full one at batch 8,192, with what SP-NGD adds for large batches). Needs Debian's
dataset-fashion-mnist, or its IDX files in a folder named by --config.data.source.

Measured (`small`, batch 8,192, two cores; docs/convergence.md): K-FAC reaches accuracy 0.8 after 20 steps, Muon after
24; SGD, LARS and Adam do not reach it in 60. `full` and `large` have not been measured: they are open until there is a
GPU.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


def get_config(preset: str = 'full') -> ConfigDict:
  choose(preset, ('full', 'small', 'large'))
  config = defaults()
  config.model = model('resnet', blocks=(1, 1, 1), classes=10, width=16, bottleneck=False, stem='small')
  config.model.dtype = 'float32'
  config.data.name = 'fashion_mnist'
  config.data.batch_size = 512
  config.data.augment = True
  config.steps = 3500
  config.eval_every = 100
  config.target = 0.92
  for name in ('kfac', 'ekfac', 'adam', 'lamb', 'muon', 'kfac_adam'):
    config[name].weight_decay = 1e-3
  for name in ('sgd', 'lars'):
    config[name].weight_decay = 5e-4
  config.kfac.subsample = 1 / 4
  if preset == 'small':
    config.model.update({'width': 8, 'stem': 'patches'})
    config.data.augment = False
    config.data.batch_size = 8192
    config.data.eval_batch_size = 2000
    config.data.eval_examples = 2000
    config.steps = 24
    config.eval_every = 1
    config.target = 0.8
    config.kfac.update({'learning_rate': 0.3, 'momentum': 0.6})
  if preset == 'large':
    config.data.batch_size = 8192
    config.steps = 220
    config.eval_every = 5
    config.recipe.update({'rate_scaling': 'linear', 'reference_batch': 8192, 'label_smoothing': 0.1})
    config.recipe.update({'mixup': 0.4, 'running_mixup': True, 'rescale_weights': ('*/conv_*/kernel', 'stem/kernel')})
    for name in ('kfac', 'sgd'):
      config[name].update({'schedule': 'polynomial', 'momentum_follows_rate': True, 'warmup_steps': 10})
  return config
