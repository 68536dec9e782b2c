"""Writes IDX files of noise in the form of Fashion-MNIST."""

import gzip
import struct

import numpy as np


def write_idx(folder, packed, train, test, plain=False):
  """Four files, gzipped or not, of noise or of plain rectangles; returns (images, labels) by split."""
  folder.mkdir(exist_ok=True)
  rng, written = np.random.default_rng(0), {}
  for split, name, n in (('train', 'train', train), ('test', 't10k', test)):
    images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)
    if plain:
      images[:] = 0
      for image, (top, left) in zip(images, rng.integers(2, 12, (n, 2)), strict=True):
        image[top : 28 - left, left : 28 - top // 2] = rng.integers(120, 256)
    for kind, array in (('images-idx3-ubyte', images), ('labels-idx1-ubyte', labels)):
      content = b'\0\0\x08' + bytes([array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()
      if packed:
        (folder / f'{name}-{kind}.gz').write_bytes(gzip.compress(content))
      else:
        (folder / f'{name}-{kind}').write_bytes(content)
    written[split] = images, labels
  return written
