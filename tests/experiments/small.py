"""A small config on the tests' eight devices, and what runs of it left."""

import json
import math
from unittest import mock

import jax

from experiments.configs import digits
from kronmesh.train.build import build


def small(optimizer='kfac', mesh='data=4,model=2', steps=6):
  config = digits.get_config()
  config.model.widths = (16, 8)
  config.data.batch_size = 64
  config.optimizer, config.mesh, config.steps = optimizer, mesh, steps
  config.eval_every, config.kfac.inverses_every = 3, 2
  config.kfac.damping = 0.01
  return config


def rows(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def losses(folder):
  return [row['loss'] for row in rows(folder) if 'loss' in row]


def steps_of(folder):
  return [row['step'] for row in rows(folder) if 'loss' in row]


def built(config):
  """The run on as many of the eight devices as its mesh has."""
  sizes = [int(axis.split('=')[1]) for axis in config.mesh.split(',')]
  return build_on(config, jax.devices()[: math.prod(sizes)])


def build_on(config, devices):
  with mock.patch('jax.devices', lambda *a: devices):
    return build(config)
