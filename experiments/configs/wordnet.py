"""What kind of thing each of WordNet's 82,115 nouns is: an R-GCN over all of them, in parts over `data`.

  python experiments/train.py --config=experiments/configs/wordnet.py
  python experiments/train.py --config=experiments/configs/wordnet.py --config.mesh=data=8 --config.devices=8

Links to what a synset is a kind or an instance of, 4,000 of them held out. Every step passes messages along all others; a
part of the graph sends the features of those nodes alone that other parts read. Presets behind a colon: `small` (minutes on
two cores). Needs Debian's wordnet-base, or a folder named by --config.data.source.

Measured (docs/graphs.md): a step equals that of the whole graph; MRR 0.021 and hits@10 0.032 on 1,000 held-out queries,
0.011 and 0.020 by how often nodes are an end. K-FAC is behind Adam here, and diverges at its default rate.
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import choose, defaults, model


def get_config(preset: str = 'small') -> ConfigDict:
  choose(preset, ('small',))
  config = defaults()
  config.task = 'links'
  config.model = model('link_predictor', width=32, decoder='distmult', layers=2, bases=0)
  config.data.update({'name': 'wordnet', 'batch_size': 1024, 'eval_batch_size': 200, 'eval_examples': 1000})
  config.steps = 250
  config.eval_every = 50
  config.optimizer = 'adam'
  config.adam.update({'learning_rate': 0.03})
  return config
