"""A small ResNet on a folder of your own pictures by K-FAC: dozens of pictures, minutes on two CPU cores.

  kronmesh train --config=small_images --config.data.folder=/my/pictures

The folder has /my/pictures/train/CLASS/*.jpg and /my/pictures/test/CLASS/*.jpg, with any endings and sizes. The classes
are counted, and the batch fits itself to the number of pictures. They are cropped to 48 pixels; --config.data.image_size
changes that.

Measured: with 48 drawn pictures of three classes to train on, 11 of 12 others are told right after 400 steps, one minute
on two cores (tests/experiments/test_small_starts.py).
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import defaults, model


def get_config() -> ConfigDict:
  config = defaults()
  config.devices = 1
  config.mesh = 'data=1'
  config.model = model('resnet', blocks=(1, 1, 1), width=16, bottleneck=False, stem='small')
  config.model.classes = 0  # 0: as many as the data have
  config.data.name = 'image_folder'
  config.data.image_size = 48
  config.data.batch_size = 0  # 0: fits itself to the number of pictures
  config.steps = 400
  config.eval_every = 50
  config.kfac.learning_rate = 0.03
  config.kfac.fisher = 'empirical'
  return config
