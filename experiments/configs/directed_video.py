"""What does the shoe do? Clips of two garments, directed by a noun whose place in WordNet's graph is the second input.

  kronmesh train --config=directed_video
  kronmesh train --config=directed_video --config.data.graph_shuffled=True

Two garments move, each in one of ten ways. One of them is a kind of what the given noun names ("boot", "shoe",
"footwear"), and the network answers with its motion. An R-GCN over the nouns makes the noun's features; the network of
clips takes the mean over the places that fit them. Training does not use the nouns in `config.data.held_out`; their
score is `new_nouns`. Presets behind a colon: `small` (a quarter of an hour on one core). Needs dataset-fashion-mnist
and wordnet-base of Debian, or their folders in --config.data.source and --config.data.graph_source.

Measured (docs/graphs.md, two seeds): after 600 steps 0.56 and 0.59 of the answers are right, and 0.32 and 0.34 are the
other garment's motion; with the graph's nodes exchanged 0.51 and 0.52 are right. For nouns that training has not used,
0.33 and 0.19 are right.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


def get_config(preset: str = 'small') -> ConfigDict:
  choose(preset, ('small',))
  config = defaults()
  config.task = 'directed'
  config.model = model('directed_video', classes=10, widths=(16, 32, 64), width=32, layers=2)
  config.data.update({'name': 'directed_motion', 'batch_size': 64, 'eval_batch_size': 400})
  config.data.held_out = (14, 16)  # "shoe" and "footwear" in WordNet 3.0
  config.steps = 600
  config.eval_every = 50
  config.kfac.update({'learning_rate': 0.05, 'damping': 0.03, 'subsample': 0.5, 'weight_decay': 1e-3})
  return config
