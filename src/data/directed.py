"""Clips of two moving garments, each with a noun for one of them: the task is to tell how that garment moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from einops import reduce
from jaxtyping import Bool, Float, Int

from .builders import FASHION_MNIST_DEBIAN, FashionMnistIdx, from_idx, read_idx
from .datasets import data_dir
from .errors import DataError
from .moving import FRAMES, MOTIONS, SIDE, moving

_COUNT = {'train': 12000, 'test': 2000}


class Directed(NamedTuple):
  """Holds clips of two garments, each with a question about the motion of one of them.

  Attributes:
    inputs: the clips, as float32 in [0, 1].
    label: the motion of the garment that is asked for.
    query: the node of a noun of which that garment is a kind.
    other: the motion of the other garment.
  """

  inputs: Float[np.ndarray, 'n t h w 1']
  label: Int[np.ndarray, ' n']
  query: Int[np.ndarray, ' n']
  other: Int[np.ndarray, ' n']


class DirectedMotion(tfds.core.GeneratorBasedBuilder):
  """12,000 and 2,000 clips of 8 frames of 16x32, each of two garments of different classes beside each other.

  Each garment has a field of 16x16 and a motion of its own.
  """

  VERSION = tfds.core.Version('2.0.0')
  pkg_dir_path = Path(__file__).parent

  def __init__(self, *, source: str = FASHION_MNIST_DEBIAN, **kwargs: Any):
    self.source = Path(source)
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    pair = tfds.features.Tensor(shape=(2,), dtype=np.int32)
    image = tfds.features.Tensor(shape=(FRAMES, SIDE // 2, SIDE, 1), dtype=np.uint8)
    features = tfds.features.FeaturesDict({'image': image, 'motions': pair, 'classes': pair})
    return self.dataset_info_from_configs(features=features, description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in _COUNT}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    garments, labels = (read_idx(self.source / name) for name in FashionMnistIdx.files_of(split))
    for i in range(_COUNT[split]):
      rng = np.random.default_rng((1, split == 'test', i))
      motions = rng.choice(len(MOTIONS), 2, replace=False)
      classes = rng.choice(np.unique(labels), 2, replace=False)
      pictures = [garments[rng.choice(np.flatnonzero(labels == c))] for c in classes]
      clips = np.concatenate([moving(g, int(m), rng, upright=True) for g, m in zip(pictures, motions, strict=True)], 2)
      image = reduce(clips.astype(np.float32), 't (h 2) (w 2) c -> t h w c', 'mean').round().astype(np.uint8)
      yield i, {'image': image, 'motions': motions.astype(np.int32), 'classes': classes.astype(np.int32)}


def load_directed(
  split: str,
  over: Bool[np.ndarray, 'classes nodes'],
  unasked: tuple[int, ...] = (),
  *,
  folder: str = '',
  source: str = '',
) -> Directed:
  """Loads a split of 'directed_motion', each clip with a noun that fits one of its garments and not the other.

  Args:
    split: 'train' or 'test'.
    over: whether each class is a kind of each node.
    unasked: nodes whose nouns training does not use.
    folder: where prepared data is kept; see `data_dir`.
    source: the folder with Fashion-MNIST's IDX files; Debian's dataset-fashion-mnist by default.

  Returns:
    A `Directed` with clips (n, 8, 16, 32, 1).

  Raises:
    DataError: there are no images, or no noun is left for a clip.
  """
  builder = from_idx(DirectedMotion, 'directed_motion', source, data_dir(folder))
  records = builder.as_data_source(split=split)
  clips = records.__getitems__(range(len(records)))
  queries, labels, others = [], [], []
  for i, clip in enumerate(clips):
    rng = np.random.default_rng((2, split == 'test', i))
    ways = rng.permutation(2)  # if one class is a kind of the other, no noun fits only the latter
    nouns = [over[clip['classes'][k]] & ~over[clip['classes'][1 - k]] for k in ways]
    fits = [[n for n in np.flatnonzero(own_nouns) if split != 'train' or n not in unasked] for own_nouns in nouns]
    if not any(fits):
      raise DataError(f'directed_motion: no noun is left for a clip of classes {clip["classes"]}; hold fewer nodes out')
    chosen = 0 if fits[0] else 1
    queries.append(rng.choice(fits[chosen]))
    labels.append(clip['motions'][ways[chosen]])
    others.append(clip['motions'][ways[1 - chosen]])
  images = np.stack([clip['image'] for clip in clips]).astype(np.float32) / 255
  return Directed(images, *(np.array(x, np.int32) for x in (labels, queries, others)))
