"""A ternary network for scikit-learn's digits, from training to a file of some kilobytes, in minutes on two cores.

  kronmesh train --config=ternary_digits:float --workdir=runs/float
  kronmesh prune --run=runs/float --zeros=0.9 --workdir=runs/pruned
  kronmesh train --config=ternary_digits:chosen --config.start=runs/pruned --workdir=runs/chosen
  kronmesh pack --run=runs/chosen --out=digits.kmt

Presets behind a colon: `share` (90 % of the weights are zero from the first step on, the smallest of each layer), `float`
(float weights, activations of four bits: the start of the commands above) and `chosen` (the zeros that kronmesh prune
chose, trained on).

Measured (two cores, one seed, 299 test images; docs/edge.md): accuracy 0.990 in `float`; with 90 % zeros chosen and trained
on, 0.973 in a file of 7,104 bytes, 53 times smaller than in float32.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


def get_config(preset: str = 'share') -> ConfigDict:
  choose(preset, ('share', 'float', 'chosen'))
  config = defaults()
  config.model = model('ternary', widths=(32, 64, 128), classes=10, pools=(1, 2, 2), rule=preset, zeros=0.9)
  config.data.batch_size = 128
  config.data.eval_batch_size = 304
  config.steps = 100
  config.eval_every = 20
  if preset == 'chosen':
    config.kfac.learning_rate = 0.03
  return config
