"""What every config starts from; a config names only what differs."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict


def grid(optimizer: str, **values: Sequence[float]) -> Iterator[dict[str, Any]]:
  """All combinations of an optimiser's settings, as overrides of a config."""
  for combination in itertools.product(*values.values()):
    settings = dict(zip(values, combination, strict=True))
    yield {'optimizer': optimizer, **{f'{optimizer}.{name}': value for name, value in settings.items()}}


def defaults() -> ConfigDict:
  """Units are in the names: *_steps and *_every count optimiser steps, sizes count examples."""
  config = ConfigDict()
  config.seed = 0
  config.steps = 300
  config.eval_every = 20
  config.checkpoint_every = 0  # 0: only at the end
  config.keep_checkpoints = 2
  config.log_every = 10
  config.mesh = 'data=-1'
  config.devices = 0  # emulated CPU devices; 0: those there are
  config.task = 'classify'
  config.target = 0.0  # of the task's metric on the evaluation set; 0: none
  config.optimizer = 'kfac'

  config.model = ConfigDict({'name': 'mlp'})
  config.data = ConfigDict({'name': 'digits', 'folder': '', 'source': '', 'batch_size': 256, 'augment': False})
  config.data.image_size = 224  # of data sets that are cropped (imagenet2012)
  config.data.eval_batch_size = 0  # 0: batch_size
  config.data.eval_split = 'test'  # 'train' evaluates how well the training set is fitted

  rate = {'learning_rate': 0.1, 'schedule': 'cosine', 'warmup_steps': 0, 'weight_decay': 0.0}
  config.kfac = ConfigDict(
    {**rate, 'momentum': 0.9, 'damping': 0.1, 'kl_clip': 0.1, 'decay': 0.95, 'fisher': 'sampled'}
  )
  config.kfac.statistics_every = 1
  config.kfac.inverses_every = 1
  config.sgd = ConfigDict({**rate, 'momentum': 0.9})
  config.adam = ConfigDict({**rate, 'learning_rate': 1e-3, 'b1': 0.9, 'b2': 0.999})
  config.muon = ConfigDict({**rate, 'learning_rate': 0.02, 'momentum': 0.95})
  return config
