"""Which way does it move? Networks on clips of moving garments, in ten motions that no single frame tells apart.

  kronmesh train --config=moving_fashion_mnist
  kronmesh compare --config=moving_fashion_mnist --optimizers=kfac,adam,muon --trials=5

Presets behind a colon: `resnet3d`, `r2plus1d` (convolutions over space and over time), `transformer` (attention over
space and over time), `streaming` (the same, but causal and with a window: it can follow a camera), `single_frame` (a
ResNet that sees one frame: chance is 0.1). Needs Debian's dataset-fashion-mnist, or its IDX files in a folder named by
--config.data.source; the clips are made from these on first use.

Measured: see docs/video.md.
"""

from typing import Any

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model

MODELS: dict[str, dict[str, Any]] = {
  'r2plus1d': {'name': 'r2plus1d', 'blocks': (1, 1, 1), 'width': 8, 'stem': 'patches'},
  'resnet3d': {'name': 'resnet', 'blocks': (1, 1, 1), 'width': 8, 'bottleneck': False, 'stem': 'patches'},
  'transformer': {'name': 'video_transformer', 'patch': (8, 8), 'layers': 2, 'width': 64, 'heads': 4},
  'streaming': {
    'name': 'video_transformer', 'patch': (8, 8), 'layers': 2, 'width': 64, 'heads': 4, 'causal': True, 'window': 8,
  },
  'single_frame': {'name': 'resnet', 'blocks': (1, 1, 1), 'width': 8, 'bottleneck': False, 'stem': 'patches'},
}  # fmt: skip


def get_config(preset: str = 'resnet3d') -> ConfigDict:
  choose(preset, tuple(MODELS))
  config = defaults()
  config.model = model(**MODELS[preset], classes=10)
  config.data.name = 'moving_fashion_mnist'
  config.data.batch_size = 128
  config.data.eval_batch_size = 200
  config.data.eval_examples = 1000
  config.data.frames = 1 if preset == 'single_frame' else 0
  config.steps = 120
  config.eval_every = 10
  config.target = 0.95
  config.kfac.update({'fisher': 'empirical', 'subsample': 1 / 4})
  # The best of five settings for each optimiser on `resnet3d`; see docs/video.md.
  config.kfac.update({'damping': 0.0056, 'momentum': 0.634})
  config.adam.update({'learning_rate': 3.5e-3, 'b1': 0.82})
  config.muon.update({'learning_rate': 9.5e-3, 'momentum': 0.861})
  for name in ('kfac', 'adam', 'muon'):
    config[name].weight_decay = 1e-3
  return config
