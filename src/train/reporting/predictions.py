"""Sample predictions of a run and its confusion matrix, computed once at its end."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Num
from PIL import Image

from ... import data, files
from ...data.folders import class_name, subfolders
from ...data.moving import MOTIONS
from .. import jsonfile
from ..runtime import processes

NAME = 'predictions.json'
EXAMPLES = 2000  # the most examples of the evaluation set that are looked at
CLASSES = 100  # the most classes of a confusion matrix
PICTURES = 12
_SIDE = 96  # pixels of a picture's longer side


def write_predictions(run: Any, state: Any, workdir: Path) -> None:
  """Writes `predictions.json` for a task that classifies or reconstructs, unless it was written at this step.

  An error does not end the run: the file then says why there are no predictions.

  run: a `run.Run`. state: its state at the end.
  """
  if run.config.task not in ('classify', 'reconstruct') or not processes.chief():
    return
  step = int(state.step)
  if _step_of(workdir / NAME) == step:
    return
  found: dict[str, Any] = {'step': step, 'task': run.config.task}
  if processes.several():
    found['skipped'] = f'The run had {jax.process_count()} processes. Sample predictions are made by a single process.'
  else:
    try:
      found |= _classified(run, state) if run.config.task == 'classify' else _reconstructed(run, state)
    except Exception as error:
      found['skipped'] = f'Sample predictions could not be computed: {" ".join(str(error).split())[:200]}'
  with contextlib.suppress(OSError):  # the disk may be full
    files.write(workdir / NAME, jsonfile.dumps(found) + '\n')


def _step_of(path: Path) -> Any:
  try:
    found = jsonfile.read(path)
  except (OSError, ValueError):
    return None
  return found.get('step') if isinstance(found, dict) else None


def _classified(run: Any, state: Any) -> dict[str, Any]:
  """Returns the confusion matrix, and the examples that were most surely wrong, then those least surely right."""
  matrix: Int[np.ndarray, 'c c'] | None = None
  chosen: list[tuple[tuple[bool, float], int, int, Num[np.ndarray, '...']]] = []
  count = right = classes = 0
  for inputs, labels, outputs in _outputs(run, state):
    shares = np.exp(outputs - outputs.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    best, classes = shares.argmax(-1), shares.shape[-1]
    if matrix is None and classes <= CLASSES:
      matrix = np.zeros((classes, classes), int)
    if matrix is not None:
      np.add.at(matrix, (labels, best), 1)
    count, right = count + len(labels), right + int((best == labels).sum())
    for x, label, guess, row in zip(inputs, labels, best, shares, strict=True):
      sure = float(row[guess])
      chosen.append(((bool(guess == label), sure if guess == label else -sure), int(label), int(guess), x))
    chosen = sorted(chosen, key=lambda one: one[0])[:PICTURES]
  pictures = [
    {'image': _picture(x), 'label': label, 'prediction': guess, 'probability': round(abs(sure), 4)}
    for (_, sure), label, guess, x in chosen
  ]
  return {
    'examples': count,
    'right': right,
    'classes': classes,
    'names': list(class_names(run.config, classes)),
    'matrix': None if matrix is None else matrix.tolist(),
    'pictures': [p for p in pictures if p['image']],
  }


def _reconstructed(run: Any, state: Any) -> dict[str, Any]:
  """Returns pictures of the first examples and of what the network makes of them."""
  inputs, _, outputs = next(_outputs(run, state))
  inputs, outputs = inputs[:PICTURES], outputs[:PICTURES]
  made = (0.5 + 0.5 * np.tanh(outputs / 2)).reshape(inputs.shape)  # the sigmoid, without overflow
  pictures = [{'image': _picture(x), 'made': _picture(y)} for x, y in zip(inputs, made, strict=True)]
  return {'pictures': [p for p in pictures if p['image']]}


def _outputs(run: Any, state: Any) -> Iterator[tuple[np.ndarray, np.ndarray, Float[np.ndarray, 'n k']]]:
  """Yields inputs, labels and outputs of the first examples of the evaluation set, batch by batch.

  One device computes, with no more examples at a time than it has in an evaluation on all devices.
  """
  device = run.mesh.devices.flat[0]
  params = state.average if run.config.recipe.average else state.params
  variables = jax.device_put(jax.device_get({'params': params, **state.model_state}), device)
  forward = jax.jit(lambda variables, inputs: run.task.model.apply(variables, inputs, train=False))
  left = EXAMPLES
  for batch in run.eval_batches():
    there = np.flatnonzero(np.asarray(batch['mask']) > 0)[:left]
    whole = _without_padding(np.asarray(batch['inputs']), run.strips)
    size = max(1, len(whole) // run.mesh.size)
    inputs = whole[there]
    filled = np.pad(inputs, [(0, -len(inputs) % size), *[(0, 0)] * (inputs.ndim - 1)], mode='edge')
    parts = [
      np.asarray(forward(variables, jax.device_put(x, device))) for x in np.split(filled, len(filled) // size or 1)
    ]
    outputs = np.concatenate(parts).astype(np.float32).reshape(len(filled), -1)
    labels = np.asarray(batch.get('label', np.zeros(len(whole), int)))
    yield inputs, labels[there], outputs[: len(inputs)]
    left -= len(inputs)
    if left <= 0:
      return


def _without_padding(images: np.ndarray, strips: Any) -> np.ndarray:
  """Returns images without the rows that make their strips equal."""
  for dim, strip in strips.items():
    rows = np.flatnonzero(strip.places >= 0)
    images = np.take(images, rows[np.argsort(strip.places[rows], kind='stable')], axis=dim)
  return images


def class_names(config: Any, classes: int) -> tuple[str, ...]:
  """Returns the names of the classes where the data have them, else ()."""
  settings = config.data
  try:
    if settings.name == 'moving_fashion_mnist':
      names = list(MOTIONS)
    elif settings.name == 'image_folder':
      names = sorted({class_name(folder) for folder in subfolders(Path(settings.folder) / 'train')})
    elif settings.name in data.LAYOUTS:
      where = {'rate': settings.rate, 'short_side': settings.short_side, 'bands': settings.bands}
      made = data.prepared(settings.name, '', data.data_dir(settings.folder), **where)
      names = made.info.features['label'].names
    elif settings.name in data.IN_MEMORY:
      names = []
    else:
      records = data.record_source(settings.name, 'train', folder=settings.folder)
      names = records.source.dataset_info.features['label'].names
  except Exception:  # names are a comfort: numbers do without them
    return ()
  return tuple(map(str, names)) if len(names) == classes else ()


def _picture(x: Num[np.ndarray, '...']) -> str:
  """Returns an image, or three frames of a clip side by side, as a small data URL; '' for another input.

  Values outside of [0, 1] are scaled to it.
  """
  if x.ndim == 4:
    x = np.concatenate([x[0], x[len(x) // 2], x[-1]], axis=1)
  if x.ndim == 2:
    x = x[..., None]
  if x.ndim != 3 or not x.size or min(x.shape[:2]) < 2:
    return ''
  x = np.nan_to_num(x.astype(np.float32))
  low, high = min(0.0, float(x.min())), max(1.0, float(x.max()))
  if low < 0 or high > 1:
    low, high = float(x.min()), float(x.max())
  grey = np.round(255 * (x - low) / (high - low or 1.0)).clip(0, 255).astype(np.uint8)
  image = Image.fromarray(grey if grey.shape[-1] == 3 else grey[..., 0])
  side = _SIDE * max(1, image.width // image.height)
  image.thumbnail((side, side))
  buffer, small = io.BytesIO(), image.width * image.height <= 48 * 48
  image.save(buffer, 'PNG' if small else 'JPEG', **({} if small else {'quality': 85}))
  kind = 'png' if small else 'jpeg'
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
