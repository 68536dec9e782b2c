"""TFDS builders for data sets that come with pip and Debian: scikit-learn's digits, and Fashion-MNIST's IDX files."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from .. import files
from . import origin
from .arrays import check_labels
from .errors import DataError
from .folders import shown
from .limits import check_regular, check_size
from .origin import Entries, Origin, origin_of

FASHION_MNIST_DEBIAN = '/usr/share/datasets/fashion-mnist'
_IDX = {
  'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
  'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'),
}


def _features(shape: tuple[int, int, int]) -> tfds.features.FeaturesDict:
  # Tensor, not Image: TFDS cannot encode an array as an Image without TensorFlow.
  return tfds.features.FeaturesDict(
    {'image': tfds.features.Tensor(shape=shape, dtype=np.uint8), 'label': tfds.features.ClassLabel(num_classes=10)}
  )


class Digits(tfds.core.GeneratorBasedBuilder):
  """scikit-learn's 1,797 handwritten digits, 8x8, values 0 to 16; every sixth example is in the test split (299)."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = None
  pkg_dir_path = Path(__file__).parent

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(features=_features((8, 8, 1)), description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {'train': self._generate_examples(test=False), 'test': self._generate_examples(test=True)}

  def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
      if (i % 6 == 5) == test:
        yield i, {'image': image.astype(np.uint8)[..., None], 'label': int(label)}


class FashionMnistIdx(tfds.core.GeneratorBasedBuilder):
  """Fashion-MNIST (Xiao et al. 2017) from IDX files, plain or gzipped, in the builder's `source` folder."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = Path(__file__).parent

  def __init__(self, *, source: str = FASHION_MNIST_DEBIAN, **kwargs: Any):
    self.source = Path(source)
    super().__init__(**kwargs)

  @staticmethod
  def images_of(split: str) -> str:
    """Returns the name of the file with the images of 'train' or 'test', without the ending of a packed one."""
    return _IDX[split][0]

  @staticmethod
  def files_of(split: str) -> tuple[str, str]:
    """Returns the names of the files with a split's images and labels."""
    return _IDX[split]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(features=_features((28, 28, 1)), description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in _IDX}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    images, labels = (read_idx(self.source / name) for name in _IDX[split])
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield i, {'image': image[..., None], 'label': int(label)}


def prepare(builder: tfds.core.DatasetBuilder, made_of: Origin | None = None) -> bool:
  """Makes the records of a set, once, and returns whether this process made them.

  TFDS speaks of downloading, but nothing is downloaded here. Of several processes that start at the same time one makes
  the records, and the others wait for it.

  made_of: the origin to keep beside the records; see `origin`.

  Raises:
    DataError: the folder cannot be written.
  """
  path = Path(builder.data_path)
  with _locked(path) as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process, which prepares {builder.name} in {path}', file=sys.stderr)
      fcntl.flock(lock, fcntl.LOCK_EX)
    if path.is_dir():
      builder.info.read_from_directory(path)
      return False
    print(f'preparing {builder.name} in {path}, once', file=sys.stderr)
    if made_of is not None:
      origin.keep(path, made_of)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
    files.sync_tree(path.parent)  # after a power cut the set is whole, or reading it fails with an error
  return True


def _locked(path: Path) -> TextIO:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f'{path.name}.lock'
    check_regular(lock)
    # Nothing is written to the lock, so that no other file is harmed if its name leads to one.
    return open(os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666), 'r+')
  except OSError as error:
    raise DataError(
      f'{path.parent} cannot be written ({error.strerror}); set KRONMESH_DATA or --config.data.folder to a folder that can'
    ) from error


def from_source(builder: tfds.core.DatasetBuilder, name: str, source: str | Path, entries: Entries | None) -> bool:
  """Prepares a set from a source, or checks that the prepared set was made from that source.

  Args:
    builder: builder of the set.
    name: name of the set, for messages.
    source: the folder or file; '' stands for whatever the records were made from.
    entries: the content of the source (see `origin`); None if the source is gone.

  Returns:
    Whether this process made the records.

  Raises:
    DataError: the records were made from another source, or the folder cannot be written.
  """
  records = Path(builder.data_path)
  made = not records.is_dir() and prepare(builder, origin_of(source, entries or ()))
  if not made:
    origin.check(name, records, source, entries)
  return made


def from_idx(kind: type[tfds.core.DatasetBuilder], name: str, source: str, where: Path) -> tfds.core.DatasetBuilder:
  """Returns the builder of a set that is made from Fashion-MNIST's files, and prepares the set if need be.

  Args:
    kind: class of the builder.
    name: name of the set, for messages.
    source: the folder of the files; '' for Debian's or, if that is not installed, for whatever was prepared.
    where: the folder for prepared data.

  Raises:
    DataError: there are no such files, or the prepared set was made from others.
  """
  builder = kind(source=source or FASHION_MNIST_DEBIAN, data_dir=where, file_format='array_record')
  entries = idx_entries(builder.source)
  if entries is not None and not Path(builder.data_path).is_dir():
    try:
      _check_idx(builder.source)
    except DataError as error:
      raise DataError(f'{name}: {error}') from error
  if entries is None and not Path(builder.data_path).is_dir():
    raise DataError(
      f'{name}: no IDX files in {shown(builder.source)}; install the Debian package dataset-fashion-mnist, '
      'or name their folder by --config.data.source'
    )
  from_source(builder, name, '' if entries is None and not source else builder.source, entries)
  return builder


def _check_idx(folder: Path) -> None:
  """Raises DataError unless the files hold pictures of 28x28 pixels and a label from 0 to 9 for each."""
  for pair in _IDX.values():
    images, labels = (read_idx(folder / name) for name in pair)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.ndim != 1:
      raise DataError(
        f'{shown(folder)}: {pair[0]} has shape {images.shape} and {pair[1]} {labels.shape}, not (n, 28, 28) and (n,)'
      )
    if len(images) != len(labels):
      raise DataError(f'{shown(folder)}: {pair[0]} has {len(images)} pictures and {pair[1]} {len(labels)} labels')
    check_labels(labels, 10, f'{shown(folder)}: {pair[1]}')
    for name in pair:
      if (folder / name).is_file() and (folder / f'{name}.gz').is_file():
        logging.warning('%s: both %s and %s.gz are there; the packed one is read', shown(folder), name, name)


def idx_entries(folder: Path) -> list[tuple[str, Path]] | None:
  """Returns the name and path of each of the four IDX files, gzipped or not, or None unless all exist."""
  arrays_read = []
  for name in (name for pair in _IDX.values() for name in pair):
    path = next((p for p in (folder / (name + '.gz'), folder / name) if p.is_file()), None)
    if path is None:
      return None
    arrays_read.append((name, path))
  return arrays_read


def read_idx(path: Path) -> np.ndarray:
  """Reads an IDX file of bytes, gzipped or not.

  Raises:
    DataError: the file is not an IDX file of bytes, is shorter than its header says, or does not fit in memory.
  """
  packed = path.with_name(path.name + '.gz')
  source_file = packed if packed.is_file() else path
  check_regular(source_file)
  try:
    with gzip.open(source_file) if source_file == packed else source_file.open('rb') as file:
      head = file.read(4)
      if head[:3] != b'\0\0\x08' or len(head) < 4:
        raise DataError(f'{shown(source_file)} is not an IDX file of bytes')
      shape = struct.unpack(f'>{head[3]}I', file.read(4 * head[3]))
      count = math.prod(shape)
      check_size(count, source_file.stat().st_size, f'{shown(source_file)}, of shape {shape},')
      values = file.read(count)
  except (OSError, EOFError, struct.error, zlib.error) as error:
    raise DataError(f'{shown(source_file)} cannot be read: {getattr(error, "strerror", None) or error}') from error
  if len(values) < count:
    raise DataError(f'{shown(source_file)} is cut off: it has {len(values)} of the {count} bytes that its header says')
  return np.frombuffer(values, np.uint8).reshape(shape)
