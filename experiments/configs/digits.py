"""A deep autoencoder on scikit-learn's digits by K-FAC, on an emulated mesh of 4 x 2 devices.

  python experiments/train.py --config=experiments/configs/digits.py

The task of `make train`: fit the training images; the target is the squared error summed over the 64 pixels.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.configs.defaults import defaults


def get_config(arg: str | None = None) -> ConfigDict:
  del arg
  config = defaults()
  config.devices = 8
  config.mesh = 'data=4,model=2'
  config.task = 'reconstruct'
  config.model = ConfigDict({'name': 'autoencoder', 'widths': (256, 128, 64, 16)})
  config.data.batch_size = 512
  config.data.eval_split = 'train'
  config.steps = 300
  config.eval_every = 5
  config.target = 0.6
  config.kfac.inverses_every = 5
  config.kfac.statistics_every = 5
  return config


def sweep() -> Iterator[dict[str, float]]:
  """Overrides worth trying."""
  for damping in (0.03, 0.1, 0.3):
    yield {'kfac.damping': damping}
