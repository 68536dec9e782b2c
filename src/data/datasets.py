"""Data sets by name: prepared on first use, kept as array_record, read without TensorFlow."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from . import builders
from .arrays import Arrays, read_arrays, stored_shape
from .errors import DataError
from .features import check_features
from .folders import tell_left_out
from .image_folder import ImageFolder
from .made import MADE
from .moving import FRAMES, SIDE, MovingFashionMnist

IN_MEMORY = ('digits', 'fashion_mnist', 'moving_fashion_mnist', 'arrays', *MADE)
"""Lists the data sets that `load_arrays` loads."""
_BRIGHTEST = {'digits': 16, 'fashion_mnist': 255, 'moving_fashion_mnist': 255}


_SHAPES = {'digits': (8, 8, 1), 'fashion_mnist': (28, 28, 1), 'moving_fashion_mnist': (FRAMES, SIDE, SIDE, 1)}


def example_shape(name: str, source: str = '') -> tuple[int, ...] | None:
  """Returns the shape of a set's examples without reading or preparing the set; None if it follows from the data.

  Args:
    name: as for `load_arrays`.
    source: for 'arrays', the folder with train.npz, of which the header alone is read.

  Raises:
    DataError: there is no such file.
  """
  return stored_shape(Path(source or '.') / 'train.npz') if name == 'arrays' else _SHAPES.get(name)


def data_dir(folder: str = '') -> Path:
  """Returns the folder of prepared data sets: `folder`, else $KRONMESH_DATA, else ~/.cache/kronmesh.

  Args:
    folder: a folder on this machine; '' for the default.

  Raises:
    DataError: the folder is an address and not on this machine, or this user has no home folder.
  """
  chosen = folder or os.environ.get('KRONMESH_DATA', '')
  if '://' in chosen:
    raise DataError(
      f'{chosen} is not a folder on this machine; prepared data must lie in one, such as a mounted bucket'
    )
  if chosen:
    return Path(chosen)
  try:
    return Path.home() / '.cache' / 'kronmesh'
  except RuntimeError as error:
    raise DataError('this user has no home folder; set KRONMESH_DATA to a folder for prepared data') from error


def load_arrays(name: str, split: str, *, folder: str = '', source: str = '') -> Arrays:
  """Loads a small data set as arrays; a set that is not prepared yet is prepared first.

  Args:
    name: 'digits', 'fashion_mnist', 'moving_fashion_mnist', 'arrays' or a name of `MADE`.
    split: 'train' or 'test'.
    folder: where prepared data is kept; see `data_dir`.
    source: for the two sets of Fashion-MNIST, the folder with the IDX files; Debian's dataset-fashion-mnist by default.
      For 'arrays', the folder with train.npz and test.npz, of `image` in [0, 1] and `label` (see `write_arrays`).

  Returns:
    An `Arrays`: images (n, h, w, c) or clips (n, t, h, w, c) as float32 in [0, 1], with classes (n,); for 'arrays' and
    the sets of `MADE`, what they hold. The arrays of prepared sets cannot be written to.

  Raises:
    DataError: the name or split is unknown, or source files are missing or cannot be read.
  """
  if name not in IN_MEMORY:
    raise DataError(f'data set {name!r} is unknown or does not fit in memory; choose from {", ".join(IN_MEMORY)}')
  if split not in ('train', 'test'):
    raise DataError(f"split {split!r} is unknown; choose 'train' or 'test'")
  if name in MADE:
    return Arrays(*MADE[name](split))
  if name == 'arrays':
    return read_arrays(Path(source or '.') / f'{split}.npz')
  try:
    files = sorted(Path(_prepared(name, folder, source).data_path).iterdir())
    state = tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _decoded(name, split, folder, source, state)
  except DataError:
    raise
  except PermissionError as error:
    raise DataError(f'{name}: {error.filename or data_dir(folder)} cannot be read: {error.strerror}') from error
  except Exception as error:
    words = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise DataError(
      f'{name}: what is prepared in {data_dir(folder)} or its source cannot be read ({words}); remove it to prepare it anew'
    ) from error


@functools.lru_cache(maxsize=2)
def _decoded(name: str, split: str, folder: str, source: str, state: tuple[tuple[str, int, int], ...]) -> Arrays:
  """Returns all examples of a split, in arrays that cannot be written to.

  The last two splits are cached for as long as their files do not change: scripts train many networks on one set, and
  TFDS takes ten seconds to decode 60,000 images.
  """
  del state  # it only makes the cache's key change with the files
  records = _prepared(name, folder, source).as_data_source(split=split)
  examples = records.__getitems__(range(len(records)))
  images = np.stack([e['image'] for e in examples]).astype(np.float32) / _BRIGHTEST[name]
  arrays = Arrays(images, np.asarray([e['label'] for e in examples], np.int32))
  for x in arrays:
    x.setflags(write=False)
  return arrays


def _prepared(name: str, folder: str, source: str) -> Any:
  where = data_dir(folder)
  if name == 'digits':
    builder = builders.Digits(data_dir=where, file_format='array_record')
    if not Path(builder.data_path).is_dir():
      builders.prepare(builder)
    return builder
  kind = MovingFashionMnist if name == 'moving_fashion_mnist' else builders.FashionMnistIdx
  return builders.from_idx(kind, name, source, where)


class Records:
  """A prepared TFDS set as a random-access source of examples {'image', 'label'}, images encoded or arrays of bytes.

  Attributes:
    classes: number of classes, or 0 if the set does not say.
    labelled: whether the set has labels; if not, every label is 0.
  """

  def __init__(self, source: Any, name: str):
    self.source, features = source, source.dataset_info.features
    self.image = _image_feature(features, name)
    self.labelled = 'label' in features
    label = features['label'] if self.labelled else None
    self.classes = getattr(label, 'num_classes', None) or 0
    if self.labelled and not self.classes and (label.shape != () or not np.issubdtype(label.np_dtype, np.integer)):
      raise DataError(f"{name}: 'label' is {type(label).__name__}, not a number; prepare the set with a ClassLabel")

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self.source[index]
    return {'image': example[self.image], 'label': example['label'] if self.labelled else 0}


def _image_feature(features: Any, name: str) -> str:
  """Returns the name of the feature that is the picture: 'image', or the only one that could be."""
  images = [
    key
    for key, kind in features.items()
    if isinstance(kind, tfds.features.Image) or (len(kind.shape or ()) == 3 and kind.np_dtype == np.uint8)
  ]
  if 'image' in images or len(images) == 1:
    return 'image' if 'image' in images else images[0]
  what = f'several pictures ({", ".join(images)})' if images else f'no picture, only {", ".join(features)}'
  raise DataError(f"{name}: the set has {what}; prepare it with one feature 'image'")


def record_source(name: str, split: str, *, folder: str = '') -> Records | ImageFolder:
  """Returns a prepared TFDS array_record data set, or 'image_folder', as a random-access source of examples.

  Args:
    name: the name of the set in TFDS, or 'image_folder'.
    split: the split, such as 'train'.
    folder: where prepared data is kept, see `data_dir`; for 'image_folder', the folder of `ImageFolder`.

  Returns:
    A sequence of examples {'image': an encoded picture or an array of bytes, 'label'}. Its attribute `classes` is the
    number of classes, or 0 if the set does not say; `labelled` says whether it has labels (if not, every label is 0).

  Raises:
    DataError: the set is not prepared in the folder, or only as tfrecord files, which need TensorFlow. Or it has no
      picture, or its labels are not numbers.
  """
  if name == 'image_folder':
    images = ImageFolder(folder, split)
    tell_left_out(f'{name}/{split}', images.left_out, len(images), data_dir() / 'left_out')
    return images
  where = data_dir(folder)
  check_features(where / name)
  try:
    features = tfds.builder(name, data_dir=where).info.features
    skip = {key: tfds.decode.SkipDecoding() for key, f in features.items() if isinstance(f, tfds.features.Image)}
    return Records(tfds.data_source(name, split=split, data_dir=where, download=False, decoders=skip or None), name)
  except DataError:
    raise
  except (tfds.core.DatasetNotFoundError, AssertionError, NotImplementedError, ValueError) as error:
    raise DataError(
      f'{name}: no array_record data set in {where} ({str(error).splitlines()[0][:120]}); prepare it there by TFDS with '
      "file_format='array_record', or name its folder by --config.data.folder"
    ) from error
