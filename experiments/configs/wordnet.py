"""What kind of thing is each of WordNet's 82,115 nouns? An R-GCN over all of them, partitioned over `data`.

  kronmesh train --config=wordnet
  kronmesh train --config=wordnet --config.mesh=data=8 --config.devices=8

A link says what a synset is a kind or an instance of. 4,000 links are held out, and every step passes messages along
all others. A partition of the graph sends only those nodes' features that other partitions read. Presets behind a
colon: `small` (minutes on two cores). Needs Debian's wordnet-base, or a folder named by --config.data.source.

Measured (docs/graphs.md): a step equals that of the whole graph. MRR (mean reciprocal rank) is 0.021 and hits@10 0.032
on 1,000 held-out queries; ranking nodes by how often they are an end gives 0.011 and 0.020. K-FAC is behind Adam here,
and diverges at its default rate.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model


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
