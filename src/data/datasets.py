"""Data sets by name: prepared on first use, kept as array_record, read without TensorFlow."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from . import builders
from .made import MADE


class DataError(ValueError):
  """A data set that is not there, in one line that says where it was looked for."""


class Arrays(NamedTuple):
  """A split that fits in memory: images as float32 in [0, 1], (n, h, w, c), and labels, (n,); of `made` sets see there."""

  image: np.ndarray
  label: np.ndarray


DATASETS = ('digits', 'fashion_mnist', 'imagenet2012', 'noise', *MADE)
_BRIGHTEST = {'digits': 16, 'fashion_mnist': 255}


def data_dir(folder: str = '') -> Path:
  """Where prepared data sets are kept: the folder, else $KRONMESH_DATA, else ~/.cache/kronmesh."""
  return Path(folder or os.environ.get('KRONMESH_DATA', '') or Path.home() / '.cache' / 'kronmesh')


def load_arrays(name: str, split: str, *, folder: str = '', source: str = '') -> Arrays:
  """A small data set as arrays.

  Args:
    name: 'digits', 'fashion_mnist' or one of `made.MADE`.
    split: 'train' or 'test'.
    folder: where prepared data is kept, see `data_dir`.
    source: for fashion_mnist: the folder with its IDX files; Debian's dataset-fashion-mnist by default.

  Raises:
    DataError: unknown name or split, or source files that are missing.
  """
  if name not in (*_BRIGHTEST, *MADE):
    known = ', '.join((*_BRIGHTEST, *MADE))
    raise DataError(f'data set {name!r} is unknown or does not fit in memory; choose from {known}')
  if split not in ('train', 'test'):
    raise DataError(f"split {split!r} is unknown; choose 'train' or 'test'")
  if name in MADE:
    return Arrays(*MADE[name](split))
  records = _prepared(name, folder, source).as_data_source(split=split)
  examples = records.__getitems__(range(len(records)))
  images = np.stack([e['image'] for e in examples]).astype(np.float32) / _BRIGHTEST[name]
  return Arrays(images, np.asarray([e['label'] for e in examples], np.int32))


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
    builder = builders.FashionMnistIdx(source=source, data_dir=where, file_format='array_record')
    if not Path(builder.data_path).is_dir() and not builders.idx_files_in(source):
      raise DataError(
        f'fashion_mnist: no IDX files in {source}; install the Debian package dataset-fashion-mnist, '
        'or name their folder by --config.data.source'
      )
  if not Path(builder.data_path).is_dir():
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare()
  return builder


def record_source(name: str, split: str, *, folder: str = '') -> Sequence[dict[str, Any]]:
  """A prepared TFDS array_record data set as a random-access source of examples, images still encoded.

  Raises:
    DataError: it is not prepared in the folder, or as tfrecord files, which need TensorFlow.
  """
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
