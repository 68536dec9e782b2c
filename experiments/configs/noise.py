"""Models on noise, to measure what their steps cost: nothing is learned.

  kronmesh train --config=noise:small_resnet --config.steps=20
  python scripts/overhead.py --config=noise:resnet50 --out=docs/overhead/resnet50

Presets behind a colon, the large ones for a GPU: `resnet50` (224x224, batch 256), `resnet3d` (a 3-D ResNet-18, 16
frames of 112x112, batch 64), `vit_b` (ViT-B/16, batch 256), `video_b` (as wide, over time and space, 16 frames of
224x224, batch 64), `gpt2` (GPT-2 small, 8 sequences of 1,024), all in bf16; for two cores `small_resnet` (batch 256),
`autoencoder` (batch 4,096), `small_resnet3d`, `small_vit`, `small_video`, `small_gpt2`.

Measured (two cores; docs/performance.md): a mean K-FAC step takes 1.05 times as long as an SGD step for `small_resnet`,
and 1.22 times for `autoencoder`.
"""

from typing import Any

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model

# By preset: the model, the shape of an example, the batch size.
PRESETS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
  'resnet50': ({'name': 'resnet', 'blocks': (3, 4, 6, 3), 'classes': 1000, 'dtype': 'bfloat16'}, (224, 224, 3), 256),
  'resnet3d': (
    {'name': 'resnet', 'blocks': (2, 2, 2, 2), 'classes': 400, 'bottleneck': False, 'dtype': 'bfloat16'},
    (16, 112, 112, 3),
    64,
  ),
  'vit_b': ({'name': 'vit', 'classes': 1000, 'dtype': 'bfloat16'}, (224, 224, 3), 256),
  'gpt2': (
    {'name': 'transformer', 'vocabulary': 50257, 'length': 1024, 'layers': 12, 'width': 768, 'heads': 12}
    | {'dtype': 'bfloat16'},
    (1024,),
    8,
  ),
  'small_resnet': (
    {'name': 'resnet', 'blocks': (1, 1, 1), 'classes': 10, 'width': 16, 'bottleneck': False, 'stem': 'small'},
    (28, 28, 1),
    256,
  ),
  'autoencoder': ({'name': 'autoencoder', 'widths': (1000, 500, 250, 30)}, (28, 28, 1), 4096),
  'small_resnet3d': (
    {'name': 'resnet', 'blocks': (1, 1), 'classes': 10, 'width': 8, 'bottleneck': False, 'stem': 'small'},
    (8, 16, 16, 1),
    32,
  ),
  'small_vit': (
    {'name': 'vit', 'classes': 10, 'patch': (7, 7), 'layers': 4, 'width': 128, 'heads': 4},
    (28, 28, 1),
    256,
  ),
  'video_b': (
    {'name': 'video_transformer', 'classes': 400, 'stacked': True, 'dtype': 'bfloat16', 'keep': 'blocks'},
    (16, 224, 224, 3),
    64,
  ),
  'small_video': (
    {'name': 'video_transformer', 'classes': 10, 'patch': (8, 8), 'layers': 4, 'width': 32, 'heads': 4}
    | {'stacked': True, 'keep': 'blocks'},
    (4, 32, 16, 1),
    64,
  ),
  'small_gpt2': (
    {'name': 'transformer', 'vocabulary': 512, 'length': 128, 'layers': 4, 'width': 128, 'heads': 4},
    (128,),
    32,
  ),
}


def get_config(preset: str = 'resnet50') -> ConfigDict:
  choose(preset, tuple(PRESETS))
  settings, shape, batch_size = PRESETS[preset]
  config = defaults()
  config.model = model(**settings)
  config.data.update({'name': 'noise', 'shape': shape, 'batch_size': batch_size})
  config.task = {'autoencoder': 'reconstruct', 'transformer': 'next_token'}.get(settings['name'], 'classify')
  config.kfac.update({'fisher': 'empirical', 'subsample': 1 / 8 if batch_size > 8 else 1.0})
  return config
