"""Splits that fit in memory: arrays that are read from files, checked and subsampled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Shaped

from .errors import DataError
from .folders import listed, shown
from .limits import check_regular, check_size


class Arrays(NamedTuple):
  """Holds a split that fits in memory; its batches use the same field names.

  Attributes:
    inputs: images as float32 in [0, 1], (n, h, w, c); clips, (n, t, h, w, c); or what a task takes instead: tokens
      (n, length), points (n, d), queries of links (n, 2).
    label: (n,): classes as int32, numbered from 0, or what a task takes instead.
  """

  inputs: Shaped[np.ndarray, ' n *example']
  label: Shaped[np.ndarray, ' n']


def write_arrays(arrays: Arrays, path: str | Path) -> None:
  """Writes `arrays` to the file `path` (.npz), which the data set 'arrays' reads; missing folders are made."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, image=arrays.inputs, label=arrays.label)


def read_arrays(path: Path) -> Arrays:
  """Reads a file that `write_arrays` or np.savez(image=, label=) wrote.

  Images (n, ...) are floats, which are taken as they are, or bytes or 16-bit integers, which are scaled to [0, 1]. Grey
  pictures (n, h, w) get a channel. Labels (n,) are whole numbers.

  Raises:
    DataError: there is no such file, or it holds something else; one line that says which example is wrong.
  """
  where = f'arrays: {shown(path)}'
  image, label = _members(path, where)
  if image.ndim < 2 or label.ndim < 1:
    raise DataError(
      f'{where} has images of shape {image.shape} and labels of shape {label.shape}, not (n, ...) and (n,)'
    )
  if label.ndim == 1 and len(label) != len(image):
    raise DataError(f'{where} has {len(image)} images and {len(label)} labels')
  if label.ndim != 1:
    remedy = '; take label.argmax(1)' if label.ndim == 2 and label.shape[1] > 1 else ''
    raise DataError(f'{where} has labels of shape {label.shape} for {len(image)} images, not one for each{remedy}')
  if not image.size:
    raise DataError(f'{where} has no images, or none with a pixel: their shape is {image.shape}')
  return Arrays(_pixels(image, where), _whole(label, where))


def _members(path: Path, where: str) -> tuple[np.ndarray, np.ndarray]:
  remedy = 'write it by np.savez(image=, label=), and name its folder by --config.data.source'
  try:
    check_regular(path)
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
      raise DataError(f'{where} holds one array, as np.save writes it; {remedy}')
    with loaded:
      lacking = {'image', 'label'} - set(loaded.files)
      if lacking:
        raise DataError(f'{where} has the arrays {listed(loaded.files)}, and not {listed(sorted(lacking))}; {remedy}')
      for name in ('image', 'label'):
        _check_member(path, name, where)
      return loaded['image'], loaded['label']
  except DataError:
    raise
  except OSError as error:
    raise DataError(f'{where} cannot be read: {error.strerror or error}; {remedy}') from error
  except Exception as error:  # numpy, zipfile and zlib raise many kinds of errors for a damaged file
    objects = 'it has arrays of objects' if 'Object arrays' in str(error) else f'{type(error).__name__}: {error}'
    raise DataError(f'{where} is not a file of np.savez ({objects.splitlines()[0][:100]}); {remedy}') from error


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
  """Reads the shape and the type of an array from the head of its .npy file."""
  version = np.lib.format.read_magic(file)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, _, dtype = read(file)
  return shape, dtype


def _check_member(path: Path, name: str, where: str) -> None:
  """Raises DataError if an array would not fit in memory, judged by its header alone.

  Images also need room for their float32 copy.
  """
  with zipfile.ZipFile(path) as packed, packed.open(f'{name}.npy') as file:
    shape, dtype = _header(file)
    stored = packed.getinfo(f'{name}.npy').compress_size
  count = math.prod(shape)
  needed = count * (dtype.itemsize + (4 if name == 'image' else 0))
  check_size(needed, stored, f"{where}: the array '{name}' of shape {shape}")


def stored_shape(path: Path) -> tuple[int, ...]:
  """Returns the shape of the examples that `read_arrays` would return, from the file's header.

  Raises:
    DataError: there is no such file, or it holds something else.
  """
  where = f'arrays: {shown(path)}'
  try:
    check_regular(path)
    with zipfile.ZipFile(path) as packed, packed.open('image.npy') as file:
      shape, _ = _header(file)
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise DataError(f"{where} has no array 'image' ({error}); write it by np.savez(image=, label=)") from error
  return (*shape[1:], 1) if len(shape) == 3 else shape[1:]


def _whole(label: np.ndarray, where: str) -> np.ndarray:
  if label.dtype.kind not in 'iub' and not (label.dtype.kind == 'f' and (label == np.round(label)).all()):
    raise DataError(f'{where} has labels of type {label.dtype}, such as {label[0]!r}; number the classes from 0')
  far = np.flatnonzero((label > 2**31 - 1) | (label < -(2**31)))
  if len(far):
    raise DataError(f'{where} has the label {label[far[0]]}; number the classes from 0')
  return label.astype(np.int32)


def _pixels(image: np.ndarray, where: str) -> np.ndarray:
  if image.ndim in (4, 5) and image.shape[1] in (1, 3, 4) and image.shape[-1] > 4:
    what = 'images' if image.ndim == 4 else 'clips'
    raise DataError(
      f'{where} has {what} of shape {image.shape[1:]}, whose channels seem to come first; store np.moveaxis(image, 1, -1)'
    )
  if image.dtype.kind == 'u' and image.dtype.itemsize <= 2:  # in any byte order
    limit, most = np.iinfo(image.dtype).max, int(image.max(initial=0))
    if most < limit / 8:
      words = (
        '%s: images of %s reach %d and are divided by %d; store bool for 0 and 1, or floats in the range that is meant'
      )
      logging.warning(words, where, image.dtype, most, limit)
    image = image.astype(np.float32) / limit
  elif image.dtype.kind not in 'fb':
    raise DataError(
      f'{where} has images of type {image.dtype}, whose range is not known; store uint8, uint16 or floats'
    )
  with np.errstate(over='ignore'):
    image = image.astype(np.float32)
  if not np.isfinite(image).all():
    bad = int(np.argmin(np.isfinite(image).reshape(len(image), -1).all(1)))
    raise DataError(f'{where}: image {bad} has values that are not finite, or too large for float32')
  return image[..., None] if image.ndim == 3 else image


def check_labels(labels: Any, classes: int, where: str) -> None:
  """Checks that all labels are in 0 ... `classes` - 1.

  Args:
    labels: the labels, (n,), or one label.
    classes: the number of classes.
    where: words for the place of the labels, which begin the error's message.

  Raises:
    DataError: a label is none of the classes; its one line names the first such label and says what to change.
  """
  labels = np.atleast_1d(np.asarray(labels))
  wrong = np.flatnonzero((labels < 0) | (labels >= classes))
  if not len(wrong):
    return
  first, least, most = labels[wrong[0]], labels.min(), labels.max()
  if least == 1 and most == classes:
    remedy = 'subtract 1'
  elif (labels == -1).any() and most < classes:
    remedy = '-1 says that there is no label: leave those examples out, or take another split'
  else:
    remedy = f'they must be 0 to {classes - 1}: number them so, or set --config.model.classes'
  count = f'{len(wrong)} of {len(labels)} labels are not' if len(labels) > 1 else 'the label is not'
  raise DataError(f'{where}: {count} one of {classes} classes, the first is {first}; {remedy}')


def some_of_each(arrays: Arrays, count: int, seed: int) -> Arrays:
  """Returns `count` examples, drawn evenly from all classes. They keep the order of the set.

  Args:
    arrays: the split to draw from, an `Arrays` or another named tuple of arrays with a field `label`.
    count: the number of examples. If it does not divide by the number of classes, the first classes get one more.
    seed: the seed of the draw.

  Raises:
    DataError: `count` is smaller than the number of classes, or a class has too few examples.
  """
  classes = np.unique(arrays.label)
  if count < len(classes):
    raise DataError(f'{count} examples leave some of {len(classes)} classes without any; take {len(classes)} at least')
  rng, chosen = np.random.default_rng((seed, 2)), []
  for place, label in enumerate(classes):
    indices = np.flatnonzero(arrays.label == label)
    wanted = count // len(classes) + (place < count % len(classes))
    if wanted > len(indices):
      raise DataError(f'{count} examples are {wanted} of class {label}, which has {len(indices)}; take fewer')
    chosen.append(rng.choice(indices, wanted, replace=False))
  rows = np.sort(np.concatenate(chosen))
  return type(arrays)(*(x[rows] for x in arrays))


def noise(shape: Sequence[int], classes: int, count: int, tokens: bool = False) -> Arrays:
  """Returns random examples with nothing to learn, for measurements; they are the same at every call.

  Args:
    shape: the shape of an example.
    classes: the number of classes, from which the labels are drawn.
    count: the number of examples.
    tokens: whether inputs are integers below `classes`; else they are numbers in [0, 1).

  Returns:
    An `Arrays` with inputs (count, *shape) and labels (count,).
  """
  rng, size = np.random.default_rng(0), (count, *shape)
  values = rng.integers(0, classes, size, np.int32) if tokens else rng.random(size, np.float32)
  return Arrays(values, rng.integers(0, max(classes, 1), count, np.int32))
