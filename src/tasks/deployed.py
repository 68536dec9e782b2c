"""The network of integers of a finished run, and the proof that it computes what the run's evaluation computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from .. import edge, models
from ..edge import pack, reference
from ..train.build import build
from ..train.checkpoints import load_export
from ..train.errors import ConfigError, RunError
from ..train.task import make_model


class Deployed(NamedTuple):
  """A finished run's network of integers. evaluate: the run's own evaluation of inputs, which gives logits."""

  network: edge.Network
  evaluate: Any
  config: ConfigDict
  float_bytes: int


class Size(NamedTuple):
  """A layer's weights, and how many are not zero."""

  name: str
  weights: int
  nonzero: int


class Packed(NamedTuple):
  """A packed run. float_bytes: of its parameters in float32. examples: how many were compared."""

  layers: list[Size]
  bytes: int
  float_bytes: int
  accuracy: float
  examples: int


def deploy(folder: str | Path) -> Deployed:
  """Reads the export of a finished run as a network of integers.

  Raises:
    ConfigError: there is no export, or it is not of a ternary network.
    edge.EdgeError: its weights are not ternary, or a sum could overflow.
  """
  variables, about = load_export(folder)
  config = ConfigDict(about['config'])
  if config.model.name != 'ternary':
    raise ConfigError(f'{folder} is a run of config.model.name={config.model.name!r}, which has no integers')
  net = make_model(config)
  network = models.ternary.network(net, variables, tuple(about['example']))
  forward = jax.jit(net.apply)
  size = 4 * sum(x.size for x in jax.tree.leaves(variables['params']))
  return Deployed(network, lambda x: np.asarray(forward(variables, x)), config, size)


def on_all_devices(config: ConfigDict) -> ConfigDict:
  """Returns a run's config for this machine: its batches divided over all devices, whatever the run had.

  Batches grow to the next size that divides.
  """
  config, count = config.copy_and_resolve_references(), len(jax.devices())
  config.mesh, config.devices, config.microbatches = 'data=-1', 0, 1
  config.start, config.recipe.teacher = '', ''
  for name in ('batch_size', 'eval_batch_size'):
    config.data[name] = -(-config.data[name] // count) * count
  return config


def sizes(network: edge.Network) -> list[Size]:
  """Returns the weights of each layer and of the head."""
  weights = {f'layer_{i}': n.weights for i, n in enumerate(network.layers)} | {'head': network.head.weights}
  return [Size(name, w.size, int(np.count_nonzero(w))) for name, w in weights.items()]


def evaluation(config: ConfigDict, most: int) -> tuple[Float[np.ndarray, 'n h w c'], Int[np.ndarray, ' n']]:
  """Returns at most `most` inputs and labels of a run's evaluation set."""
  inputs, labels = [], []
  config = on_all_devices(config)
  config.optimizer = 'sgd'  # only its data are used
  for batch in build(config).eval_batches():
    real = np.asarray(batch['mask']) > 0 if 'mask' in batch else slice(None)
    inputs.append(np.asarray(batch['inputs'])[real])
    labels.append(np.asarray(batch['label'])[real])
    if sum(map(len, labels)) >= most:
      break
  return np.concatenate(inputs)[:most], np.concatenate(labels)[:most]


def compared(deployed: Deployed, network: edge.Network, inputs: np.ndarray) -> Int[np.ndarray, 'n classes']:
  """Returns the reference's sums, if the run's evaluation and the compiled program give the same logits.

  network: the network as it was read back from a file.

  Raises:
    RunError: they do not.
  """
  run = jax.jit(lambda x: edge.forward(network, x))
  sums = []
  for at in range(0, len(inputs), 500):
    part = inputs[at : at + 500]
    expected = edge.streams(network, reference.quantised(part, network.plan.bits))[-1]
    logits = reference.logits(deployed.network, expected)
    for what, equal in (
      ('the compiled program', np.array_equal(run(part), expected)),
      ("the run's evaluation", np.array_equal(deployed.evaluate(part), logits)),
    ):
      if not equal:
        raise RunError(f'{what} differs from the reference in examples {at} to {at + len(part) - 1}')
    sums.append(expected)
  return np.concatenate(sums)


def pack_run(folder: str | Path, out: Path, examples: int) -> Packed:
  """Packs a finished run's network and compares it, read back, with the run's evaluation.

  Raises:
    ConfigError: as `deploy`.
    edge.EdgeError: as `deploy`, or the network does not fit the format.
    RunError: forms of the network differ.
  """
  deployed = deploy(folder)
  inputs, labels = evaluation(deployed.config, examples)
  again = pack.unpacked(pack.packed(deployed.network))
  sums = compared(deployed, again, inputs)
  size = pack.save(deployed.network, out)
  accuracy = float((sums.argmax(-1) == labels).mean())
  return Packed(sizes(again), size, deployed.float_bytes, accuracy, len(labels))
