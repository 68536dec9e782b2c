"""TFDS builders for data sets that pip and Debian bring: scikit-learn's digits, and Fashion-MNIST's IDX files."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

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
    """The name of the file with the images of 'train' or 'test', not packed."""
    return _IDX[split][0]

  @staticmethod
  def files_of(split: str) -> tuple[str, str]:
    """The names of the files with its images and labels."""
    return _IDX[split]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(features=_features((28, 28, 1)), description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in _IDX}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    images, labels = (read_idx(self.source / name) for name in _IDX[split])
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield i, {'image': image[..., None], 'label': int(label)}


def prepare(builder: tfds.core.DatasetBuilder) -> bool:
  """Makes the set's records, once: TFDS speaks of downloading, which is not done here.

  Of several processes that come at the same time one makes them, and the others wait for it.

  Returns:
    Whether this process made them.
  """
  path = Path(builder.data_path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with (path.parent / f'{path.name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if path.is_dir():
      builder.info.read_from_directory(path)
      return False
    print(f'preparing {builder.name} in {path}, once', file=sys.stderr)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  return True


def idx_files_in(folder: str) -> bool:
  """Whether the folder has all four IDX files, gzipped or not."""
  return all(
    any((Path(folder) / (name + end)).is_file() for end in ('', '.gz')) for pair in _IDX.values() for name in pair
  )


def read_idx(path: Path) -> np.ndarray:
  """An IDX file of bytes, gzipped or not."""
  packed = path.with_name(path.name + '.gz')
  data = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
  if data[:3] != b'\0\0\x08':
    raise ValueError(f'{path} is no IDX file of bytes')
  ndim = data[3]
  shape = struct.unpack(f'>{ndim}I', data[4 : 4 + 4 * ndim])
  return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
