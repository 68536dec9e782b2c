"""A classifier of scikit-learn's digits by K-FAC, on an emulated mesh of 4 x 2 devices: `make train-classifier`.

  python experiments/train.py --config=experiments/configs/digits_classifier.py

The target is the accuracy on the 299 images held out (256 of them: whole batches are evaluated).
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import defaults


def get_config(arg: str | None = None) -> ConfigDict:
  del arg
  config = defaults()
  config.devices = 8
  config.mesh = 'data=4,model=2'
  config.task = 'classify'
  config.model = ConfigDict({'name': 'mlp', 'hidden': (128, 64), 'classes': 10, 'activation': 'tanh'})
  config.data.batch_size = 256
  config.steps = 100
  config.eval_every = 2
  config.target = 0.97
  return config
