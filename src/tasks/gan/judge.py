"""A trained classifier as a judge of images: the classes that it gives them, and its features of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from scipy import linalg

from ...train.checkpoints import load_export
from ...train.errors import ConfigError
from ...train.registry import make_task

Features = Float[np.ndarray, 'n d']


class Judge(NamedTuple):
  """A classifier that judges images.

  name: the names of the network and its run, after which scores are named. logits, features: functions of images.
  """

  name: str
  logits: Callable[[Float[Array, 'b h w c']], Float[Array, 'b classes']]
  features: Callable[[Float[Array, 'b h w c']], Float[Array, 'b d']]


def read_judge(run: str | Path) -> Judge:
  """Reads the network of a classifier's finished run.

  Raises:
    ConfigError: the run has no export, or is not a classifier's.
  """
  variables, about = load_export(Path(run) / 'export')
  config = ConfigDict(about['config'])
  if config.task != 'classify':
    raise ConfigError(f'{run} is a run of {config.task!r}; a judge is a run of a classifier')
  model = make_task(config).model

  def logits(images):
    return model.apply(variables, images, train=False)

  features = functools.partial(before_logits, model, variables)
  return Judge(f'{config.model.name} of {Path(run).name}', logits, features)


def before_logits(model: nn.Module, variables: Any, images: Float[Array, 'b ...']) -> Float[Array, 'b d']:
  """Returns the input of a network's layer 'logits'."""
  seen = []

  def look(call, args, kwargs, context):
    if context.module.name == 'logits':
      seen.append(args[0])
    return call(*args, **kwargs)

  with nn.intercept_methods(look):
    model.apply(variables, images, train=False)
  return seen[0].reshape(len(images), -1).astype('float32')


def frechet(a: Features, b: Features) -> float:
  """Returns the Frechet distance of Gaussians with the features' means and covariances (Heusel et al. 2017, eq. 6)."""
  covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  root = linalg.sqrtm(covariances[0] @ covariances[1])
  away = ((a.mean(0) - b.mean(0)) ** 2).sum()
  return float(away + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def in_batches(fn: Callable, images: np.ndarray, size: int = 1000) -> np.ndarray:
  run = jax.jit(fn)
  return np.concatenate([np.asarray(run(images[i : i + size])) for i in range(0, len(images), size)])
