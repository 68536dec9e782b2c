"""A trained model in plain Python: loaded from a run's export, with the pictures prepared as they were in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Inexact, Num
from ml_collections import ConfigDict

from .. import data
from .checkpoints import load_export
from .errors import ConfigError
from .task import make_model


class Trained(NamedTuple):
  """Holds a trained model; `load_model` makes it.

  Attributes:
    predict: inputs, (examples, *example), as batches of the run hold them -> outputs, (examples, outputs): logits of
      the classes, or of the pixels of a reconstruction.
    prepare: paths of pictures, or one path -> inputs, (pictures, *example), cropped and normalised as in the run's
      evaluation. It raises ConfigError for a run whose examples are not pictures of files.
    names: the names of the classes, in the order of the outputs; empty if the data have none.
    example: the shape of an example.
    config: the run's config.
    scores: the scores of the run's last evaluation, by name.
  """

  predict: Callable[[Num[np.ndarray, 'b ...']], Inexact[np.ndarray, 'b ...']]
  prepare: Callable[[str | Path | Sequence[str | Path]], Float[np.ndarray, 'b ...']]
  names: tuple[str, ...]
  example: tuple[int, ...]
  config: ConfigDict
  scores: dict[str, float]


def load_model(folder: str | Path) -> Trained:
  """Loads the trained model of a run, to predict with it in plain Python.

  Args:
    folder: the work folder of a run that has ended, or its folder `export`.

  Returns:
    A `Trained`.

  Raises:
    ConfigError: there is no export, it cannot be read, or its task has no model of inputs alone (graphs, GANs).
    data.DataError: the export claims to be larger than memory.
  """
  variables, about = load_export(folder)
  config = ConfigDict(about['config'])
  if config.task not in ('classify', 'reconstruct', 'next_token'):
    raise ConfigError(f'{folder}: a model of config.task={config.task!r} needs more than inputs; use load_export')
  model = make_model(config)
  forward = jax.jit(lambda variables, inputs: model.apply(variables, inputs, train=False))

  def predict(inputs: Num[np.ndarray, 'b ...']) -> Inexact[np.ndarray, 'b ...']:
    shape = tuple(about['example'])
    if np.shape(inputs)[1:] != shape:
      raise ConfigError(f'inputs have the shape {np.shape(inputs)}, not (examples, {", ".join(map(str, shape))})')
    return np.asarray(forward(variables, inputs))

  def prepare(paths: str | Path | Sequence[str | Path]) -> Float[np.ndarray, 'b ...']:
    pictures = len(about['example']) == 3 and config.data.name not in (*data.IN_MEMORY, *data.SCENES, 'noise')
    if not pictures:
      raise ConfigError(f'config.data.name={config.data.name!r} has no pictures of files; give predict arrays')
    paths = [paths] if isinstance(paths, str | Path) else paths
    return np.stack([data.prepared_picture(path, config.data.image_size) for path in paths])

  return Trained(predict, prepare, tuple(about.get('names', ())), tuple(about['example']), config, about['scores'])
