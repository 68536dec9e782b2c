"""Alarms on a surveillance camera: does the last frame of a clip show what should not be there?

  kronmesh train --config=anomalies
  python scripts/alarms.py --config=anomalies --workdir=runs/anomalies

A 3-D ResNet sees 0.7 seconds of a real film of pedestrians with injected anomalies (src/data/surveillance.py).
`scripts/alarms.py` trains it, and then scores every frame of the test scenes next to a baseline: the difference of
frames. Needs vtest.avi of Debian's opencv-doc, or the file's path in --config.data.source.

Measured: see docs/alarms.md.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import defaults, model


def get_config() -> ConfigDict:
  config = defaults()
  config.model = model('resnet', blocks=(1, 1, 1), width=16, bottleneck=False, stem='patches', classes=2)
  config.data.update({'name': 'surveillance', 'frames': 4, 'every': 2, 'batch_size': 64, 'eval_batch_size': 200})
  config.data.update({'eval_split': 'validation', 'eval_examples': 1000, 'augment': True, 'short_side': 36})
  config.steps = 300
  config.eval_every = 100
  config.kfac.update({'fisher': 'empirical', 'subsample': 1 / 2, 'weight_decay': 1e-3})
  return config
