"""Alarms from a dashcam: is there a collision in the next second and a half?

  kronmesh train --config=accidents
  python scripts/alarms.py --config=accidents --workdir=runs/accidents

A 3-D ResNet sees the last 0.7 seconds of rendered scenes, which are made on first use (src/data/dashcam.py).
`scripts/alarms.py` trains it, and then scores every frame of the test scenes next to a baseline: the expansion of the
picture.

Measured: see docs/alarms.md.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import defaults, model


def get_config() -> ConfigDict:
  config = defaults()
  config.model = model('resnet', blocks=(1, 1, 1), width=16, bottleneck=False, stem='patches', classes=2)
  config.data.update({'name': 'dashcam', 'frames': 4, 'every': 2, 'batch_size': 64, 'eval_batch_size': 200})
  config.data.update({'eval_split': 'validation', 'eval_examples': 1000, 'augment': True, 'short_side': 32})
  config.steps = 2500
  config.eval_every = 250
  config.kfac.update({'fisher': 'empirical', 'subsample': 1 / 2, 'weight_decay': 1e-3})
  return config
