"""What does the shoe do? Clips of two garments, directed by a noun whose place in WordNet's graph is the second input.

  python experiments/train.py --config=experiments/configs/directed_video.py
  python experiments/train.py --config=experiments/configs/directed_video.py --config.data.graph_shuffled=True

Two garments move, each in its own way; a noun is given of which one of them is a kind ("boot", "shoe", "footwear"), and its
motion is asked for, one of ten. The network of clips takes the mean over the places that fit the noun's features, which an
R-GCN over the nouns makes. Nouns in `config.data.held_out` are not used in training: their score is `new_nouns`. Presets
behind a colon: `small` (a quarter of an hour on one core). Needs dataset-fashion-mnist and wordnet-base of Debian, or their
folders in --config.data.source and --config.data.graph_source.

Measured (docs/graphs.md, two seeds): 0.56 and 0.59 after 600 steps, the other garment's motion 0.32 and 0.34; with the
graph's nodes exchanged 0.51 and 0.52. Of nouns that training has not used 0.33 and 0.19 are right.
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import choose, defaults, model


def get_config(preset: str = 'small') -> ConfigDict:
  choose(preset, ('small',))
  config = defaults()
  config.task = 'directed'
  config.model = model('directed_video', classes=10, widths=(16, 32, 64), width=32, layers=2)
  config.data.update({'name': 'directed_motion', 'batch_size': 64, 'eval_batch_size': 400})
  config.data.held_out = (14, 16)  # "shoe" and "footwear" of WordNet 3.0
  config.steps = 600
  config.eval_every = 50
  config.kfac.update({'learning_rate': 0.05, 'damping': 0.03, 'part': 0.5, 'weight_decay': 1e-3})
  return config
