"""Garments that no training image shows, told apart by what WordNet says they are kinds of.

  python experiments/train.py --config=experiments/configs/zero_shot.py
  python experiments/train.py --config=experiments/configs/zero_shot.py --config.data.graph_shuffled=True

Fashion-MNIST without the images of two classes (`config.data.held_out`). The input beside an image is the graph of all that
the ten classes are kinds of; an R-GCN makes a vector of every class, seen or not, a convolutional network one of the image.
Reported: the accuracy on unseen classes among those alone (zero_shot), and the harmonic mean of seen and unseen ones' among
all ten (harmonic). Presets behind a colon: `small` (minutes on two cores). Needs Debian's dataset-fashion-mnist and
wordnet-base, or folders named by --config.data.source and --config.data.graph_source.

Measured (five sets of three classes; docs/graphs.md): zero_shot 0.587, 0.337 with nodes exchanged, chance 0.333.
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import choose, defaults, model


def get_config(preset: str = 'small') -> ConfigDict:
  choose(preset, ('small',))
  config = defaults()
  config.task = 'zero_shot'
  config.model = model('zero_shot', widths=(16, 32, 64), width=32, layers=2)
  config.data.update({'name': 'fashion_mnist', 'batch_size': 512, 'eval_batch_size': 1000, 'held_out': (4, 7)})
  config.steps = 150
  config.eval_every = 50
  config.kfac.update({'learning_rate': 0.3, 'damping': 0.03})
  return config
