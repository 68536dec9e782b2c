"""experiments/train.py with a fault before batch 20: python -m tests.experiments.faulty raise --config=..."""

import sys
import time

import jax.numpy as jnp

from kronmesh.train import loop as trainer
from kronmesh.train.runtime.launch import launch

plain = trainer.build


def build(config):
  """The run, with a fault in its data. The trainer builds it, as it does in the other processes."""
  if HOW == 'hang at the start':
    time.sleep(1000)
  run = plain(config)

  def batches(seed, start):
    for number, batch in enumerate(run.train_batches(seed, start), start):
      if number == 20 and HOW == 'raise':
        raise KeyError('a bug')
      if number == 20 and HOW == 'hang':
        time.sleep(1000)
      if number == 20 and HOW == 'nan':
        batch = {**batch, 'inputs': batch['inputs'] * jnp.nan}
      yield batch

  return run._replace(train_batches=batches)


if __name__ == '__main__':
  HOW = sys.argv.pop(1)
  trainer.build = build
  launch(lambda config, workdir: trainer.train(config, workdir))
