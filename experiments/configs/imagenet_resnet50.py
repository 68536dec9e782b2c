"""ResNet-50 on ImageNet by K-FAC, bf16, batch 4,096.

  kronmesh train --config=imagenet_resnet50 --config.data.folder=/path/to/tfds

Reads imagenet2012 as TFDS prepares it with file_format='array_record'.

Measured: nothing yet. The data set cannot be shipped; the tests run this config on mock data of the same schema.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import defaults, model


def get_config() -> ConfigDict:
  config = defaults()
  config.model = model('resnet', blocks=(3, 4, 6, 3), classes=1000, width=64)
  config.model.bottleneck = True
  config.model.stem = 'imagenet'
  config.model.dtype = 'bfloat16'
  config.data.name = 'imagenet2012'
  config.data.batch_size = 4096
  config.data.eval_split = 'validation'
  config.steps = 10_000
  config.eval_every = 1000
  config.checkpoint_every = 1000
  # As in SP-NGD (2002.06015): there is no second backward pass to run or to compile.
  config.kfac.fisher = 'empirical'
  config.kfac.warmup_steps = 500
  config.kfac.weight_decay = 1e-3
  config.kfac.subsample = 1 / 8
  return config
