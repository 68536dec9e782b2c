"""Data sets by name: prepared on first use, kept as array_record, read without TensorFlow."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from . import builders
from .made import MADE
from .moving import MovingFashionMnist


class DataError(ValueError):
  """A data set that is not there, in one line that says where it was looked for."""


class Arrays(NamedTuple):
  """A split that fits in memory: images as float32 in [0, 1], (n, h, w, c), or clips, (n, t, h, w, c), and labels, (n,).

  Of `made` sets see there.
  """

  image: np.ndarray
  label: np.ndarray


class ImageFolder:
  """Images in a folder for each split and class, `folder/split/class/*.jpg`, as a random-access source of examples.

  Classes are the folders' names in order, images encoded as they are.

  Raises:
    DataError: there are none.
  """

  def __init__(self, folder: str | Path, split: str):
    root = Path(folder) / split
    self.classes = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    endings = {'.bmp', '.gif', '.jpeg', '.jpg', '.png', '.webp'}
    self.files = [
      (path, label)
      for label, name in enumerate(self.classes)
      for path in sorted((root / name).iterdir())
      if path.suffix.lower() in endings
    ]
    if not self.files:
      raise DataError(f'no images in {root}/CLASS/; name a folder with {split}/CLASS/*.jpg by --config.data.folder')

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path, label = self.files[index]
    return {'image': path.read_bytes(), 'label': label}


IN_MEMORY = ('digits', 'fashion_mnist', 'moving_fashion_mnist', 'arrays', *MADE)
_BRIGHTEST = {'digits': 16, 'fashion_mnist': 255, 'moving_fashion_mnist': 255}


def data_dir(folder: str = '') -> Path:
  """Where prepared data sets are kept: the folder, else $KRONMESH_DATA, else ~/.cache/kronmesh."""
  return Path(folder or os.environ.get('KRONMESH_DATA', '') or Path.home() / '.cache' / 'kronmesh')


def load_arrays(name: str, split: str, *, folder: str = '', source: str = '') -> Arrays:
  """A small data set as arrays.

  Args:
    name: 'digits', 'fashion_mnist', 'moving_fashion_mnist', 'arrays' or one of `made.MADE`.
    split: 'train' or 'test'.
    folder: where prepared data is kept, see `data_dir`.
    source: for the two of Fashion-MNIST: the folder with its IDX files; Debian's dataset-fashion-mnist by default. For
      'arrays' the folder with train.npz and test.npz, of `image` in [0, 1] and `label` (`write_arrays` makes them).

  Raises:
    DataError: unknown name or split, or source files that are missing.
  """
  if name not in IN_MEMORY:
    raise DataError(f'data set {name!r} is unknown or does not fit in memory; choose from {", ".join(IN_MEMORY)}')
  if split not in ('train', 'test'):
    raise DataError(f"split {split!r} is unknown; choose 'train' or 'test'")
  if name in MADE:
    return Arrays(*MADE[name](split))
  if name == 'arrays':
    return _read_arrays(Path(source or '.') / f'{split}.npz')
  try:
    files = sorted(Path(_prepared(name, folder, source).data_path).iterdir())
    state = tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _decoded(name, split, folder, source, state)
  except DataError:
    raise
  except Exception as error:
    words = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise DataError(
      f'{name}: what is prepared in {data_dir(folder)} or its source cannot be read ({words}); remove it to prepare it anew'
    ) from error


@functools.lru_cache(maxsize=2)
def _decoded(name: str, split: str, folder: str, source: str, state: tuple[tuple[str, int, int], ...]) -> Arrays:
  """All examples of a split, in arrays that cannot be written to.

  Those of the last two splits are kept, for as long as their files are in the same state: scripts train many networks on
  one set, and TFDS takes ten seconds to decode 60,000 images.
  """
  del state  # it is a part of the cache's key
  records = _prepared(name, folder, source).as_data_source(split=split)
  examples = records.__getitems__(range(len(records)))
  images = np.stack([e['image'] for e in examples]).astype(np.float32) / _BRIGHTEST[name]
  arrays = Arrays(images, np.asarray([e['label'] for e in examples], np.int32))
  for x in arrays:
    x.setflags(write=False)
  return arrays


def write_arrays(arrays: Arrays, path: str | Path) -> None:
  """As 'arrays' reads them."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, image=arrays.image, label=arrays.label)


def _read_arrays(path: Path) -> Arrays:
  try:
    with np.load(path) as found:
      image, label = found['image'].astype(np.float32), found['label'].astype(np.int32)
  except (OSError, KeyError, ValueError) as error:
    raise DataError(
      f'arrays: {path} is no file of np.savez(image=, label=) ({type(error).__name__}); name their folder by '
      '--config.data.source'
    ) from error
  if not len(label) or len(image) != len(label):
    raise DataError(f'arrays: {path} has {len(image)} images and {len(label)} labels')
  return Arrays(image, label)


def some_of_each(arrays: Arrays, count: int, seed: int) -> Arrays:
  """So many examples, as many of every class as of any other, drawn by the seed and in the set's order.

  Raises:
    DataError: fewer than there are classes, or more of one than there are.
  """
  classes = np.unique(arrays.label)
  if count < len(classes):
    raise DataError(f'{count} examples leave some of {len(classes)} classes without any; take {len(classes)} at least')
  rng, chosen = np.random.default_rng((seed, 2)), []
  for place, label in enumerate(classes):
    own = np.flatnonzero(arrays.label == label)
    wanted = count // len(classes) + (place < count % len(classes))
    if wanted > len(own):
      raise DataError(f'{count} examples are {wanted} of class {label}, which has {len(own)}; take fewer')
    chosen.append(rng.choice(own, wanted, replace=False))
  rows = np.sort(np.concatenate(chosen))
  return type(arrays)(*(x[rows] for x in arrays))


def noise(shape: Sequence[int], classes: int, count: int, tokens: bool = False) -> Arrays:
  """Examples of a shape with nothing to learn, for measurements: numbers in [0, 1) or, for `tokens`, below `classes`."""
  rng, size = np.random.default_rng(0), (count, *shape)
  values = rng.integers(0, classes, size, np.int32) if tokens else rng.random(size, np.float32)
  return Arrays(values, rng.integers(0, max(classes, 1), count, np.int32))


def _prepared(name: str, folder: str, source: str) -> Any:
  where = data_dir(folder)
  if name == 'digits':
    builder = builders.Digits(data_dir=where, file_format='array_record')
  else:
    source = source or builders.FASHION_MNIST_DEBIAN
    kind = MovingFashionMnist if name == 'moving_fashion_mnist' else builders.FashionMnistIdx
    builder = kind(source=source, data_dir=where, file_format='array_record')
    if not Path(builder.data_path).is_dir():
      idx_missing(name, source)
  if not Path(builder.data_path).is_dir():
    builders.prepare(builder)
  return builder


def idx_missing(name: str, source: str) -> None:
  """Raises DataError unless the folder has Fashion-MNIST's files."""
  if not builders.idx_files_in(source):
    raise DataError(
      f'{name}: no IDX files in {source}; install the Debian package dataset-fashion-mnist, '
      'or name their folder by --config.data.source'
    )


def class_count(source: Any) -> int:
  """How many classes a source of `record_source` has; 0 where it does not say."""
  if isinstance(source, ImageFolder):
    return len(source.classes)
  features = source.dataset_info.features
  return (features['label'].num_classes or 0) if 'label' in features else 0


def record_source(name: str, split: str, *, folder: str = '') -> Sequence[dict[str, Any]]:
  """A prepared TFDS array_record data set, or 'image_folder', as a random-access source of examples, images encoded.

  Raises:
    DataError: it is not prepared in the folder, or as tfrecord files, which need TensorFlow.
  """
  if name == 'image_folder':
    return ImageFolder(folder, split)
  where = data_dir(folder)
  try:
    return tfds.data_source(
      name, split=split, data_dir=where, download=False, decoders={'image': tfds.decode.SkipDecoding()}
    )
  except (tfds.core.DatasetNotFoundError, AssertionError, NotImplementedError, ValueError) as error:
    raise DataError(
      f'{name}: no array_record data set in {where} ({str(error).splitlines()[0][:120]}); prepare it there by TFDS with '
      "file_format='array_record', or name its folder by --config.data.folder"
    ) from error
