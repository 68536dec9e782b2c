"""Trains pykeen's models and prints their filtered scores. scripts/links.py runs it with a Python that has pykeen.

Each line of the input describes a training, and each line of the output holds its scores, both as JSON.
"""

import json
import sys
import time


def main(wanted: dict) -> dict:
  """Trains one model and returns its scores.

  wanted: folder (with train.txt and so on), decoder, width (in real numbers), epochs, batch, rate, seed, split.
  """
  from pykeen.pipeline import pipeline
  from pykeen.triples import TriplesFactory

  train = TriplesFactory.from_path(f'{wanted["folder"]}/train.txt', create_inverse_triples=True)
  ids = {'entity_to_id': train.entity_to_id, 'relation_to_id': train.relation_to_id}
  others = {s: TriplesFactory.from_path(f'{wanted["folder"]}/{s}.txt', **ids) for s in ('valid', 'test')}
  width = wanted['width'] // 2 if wanted['decoder'] == 'complex' else wanted['width']
  began = time.perf_counter()
  result = pipeline(
    training=train,
    validation=others['valid'],
    testing=others[wanted['split']],
    model={'complex': 'ComplEx', 'distmult': 'DistMult'}[wanted['decoder']],
    model_kwargs={'embedding_dim': width},
    loss='CrossEntropyLoss',
    training_loop='lcwa',
    optimizer='Adam',
    optimizer_kwargs={'lr': wanted['rate']},
    training_kwargs={'num_epochs': wanted['epochs'], 'batch_size': wanted['batch'], 'use_tqdm': False},
    evaluator_kwargs={'filtered': True},
    evaluation_kwargs={'use_tqdm': False},
    random_seed=wanted['seed'],
    device='cpu',
    filter_validation_when_testing=True,
  )
  get = lambda name: float(result.get_metric(f'both.realistic.{name}'))  # noqa: E731
  return {
    'mrr': get('inverse_harmonic_mean_rank'),
    'hits1': get('hits_at_1'),
    'hits10': get('hits_at_10'),
    'seconds': time.perf_counter() - began,
  }


if __name__ == '__main__':
  for line in sys.stdin:  # one training per line, so that Python starts only once
    print(json.dumps(main(json.loads(line))), flush=True)
