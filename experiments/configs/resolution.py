"""One video model from 112 pixels to 8K: R(2+1)D on clips of 16 frames of noise, to plan and measure its cost.

  kronmesh train --config=resolution:small_112
  python scripts/resolution.py --out=docs/resolution
  kronmesh plan --config=resolution:8k --mesh=space=16

Presets behind a colon: `112`, `hd` (1280x720), `4k` (3840x2160), `8k` (7680x4320): one clip a step, in bf16, with
blocks computed again in the backward pass. `small_112` and so on are narrow and shallow networks on four frames in
float32, for two cores.

Measured: docs/resolution.md.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model

SIZES = {'112': (112, 112), 'hd': (720, 1280), '4k': (2160, 3840), '8k': (4320, 7680)}


def get_config(preset: str = '112') -> ConfigDict:
  choose(preset, (*SIZES, *(f'small_{name}' for name in SIZES)))
  small, size = preset.startswith('small_'), SIZES[preset.removeprefix('small_')]
  config = defaults()
  if small:
    config.model = model('r2plus1d', blocks=(1, 1), width=8, stem='patches', classes=10)
  else:
    config.model = model('r2plus1d', blocks=(2, 2, 2, 2), width=64, stem='large', classes=400)
    config.model.dtype = 'bfloat16'
  config.model.keep = 'blocks'
  config.data.update({'name': 'noise', 'shape': (4 if small else 16, *size, 3), 'batch_size': 1})
  config.kfac.update({'fisher': 'empirical'})
  return config
