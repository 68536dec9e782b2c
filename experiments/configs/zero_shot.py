"""Garments that no training image shows, told apart by what they are kinds of in WordNet.

  kronmesh train --config=zero_shot
  kronmesh train --config=zero_shot --config.data.graph_shuffled=True

The data set is Fashion-MNIST without the training images of two classes (`config.data.held_out`). A second input is the
graph of everything that the ten classes are kinds of. An R-GCN makes a vector for every class, seen or not, and a
convolutional network makes one for the image. Two scores are reported: the accuracy on unseen classes when only these
may be the answer (zero_shot), and the harmonic mean of the accuracies on seen and on unseen classes when any of the ten
may be (harmonic). Presets behind a colon: `small` (minutes on two cores). Needs Debian's dataset-fashion-mnist and
wordnet-base, or folders named by --config.data.source and --config.data.graph_source.

Measured (five sets of three classes; docs/graphs.md): zero_shot is 0.587, with nodes exchanged 0.337, by chance 0.333.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


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
