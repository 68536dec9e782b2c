"""Scenes: short films of one fixed length, and for every frame whether an alarm is right there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32, UInt8

from .datasets import Arrays, DataError

SPLITS = ('train', 'validation', 'test')


class Scene(NamedTuple):
  """Grey frames, for each whether an alarm is right (1) or false (0), and which of the builder's kinds it is."""

  frames: UInt8[np.ndarray, 't h w']
  label: UInt8[np.ndarray, 't']
  kind: str


class Scenes(NamedTuple):
  """A split of scenes; `kinds` names what `kind` counts, `rate` is in frames a second."""

  frames: UInt8[np.ndarray, 's t h w']
  label: UInt8[np.ndarray, 's t']
  kind: Int32[np.ndarray, 's']
  kinds: tuple[str, ...]
  rate: float


class SceneBuilder(tfds.core.GeneratorBasedBuilder):
  """What sets of scenes have in common. A subclass says KINDS, SHAPE, RATE and COUNT, and makes scene i of a split."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = Path(__file__).parent
  KINDS: tuple[str, ...]
  SHAPE: tuple[int, int, int]  # time, height, width
  RATE: float
  COUNT: dict[str, int]

  def scene(self, split: str, i: int) -> Scene:
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'frames': tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8),
      'label': tfds.features.Tensor(shape=self.SHAPE[:1], dtype=np.uint8),
      'kind': tfds.features.ClassLabel(names=list(self.KINDS)),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in self.COUNT}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in range(self.COUNT[split]):
      yield i, self.scene(split, i)._asdict()


def generator(split: str, i: int) -> np.random.Generator:
  """What scene i of a split is drawn from."""
  return np.random.default_rng((0, SPLITS.index(split), i))


def read(builder: SceneBuilder, split: str) -> Scenes:
  """A split of a prepared set."""
  records = builder.as_data_source(split=split)
  examples = records.__getitems__(range(len(records)))
  frames, label, kind = (np.stack([e[name] for e in examples]) for name in ('frames', 'label', 'kind'))
  return Scenes(frames, label, kind.astype(np.int32), builder.KINDS, builder.RATE)


class Windows:
  """All clips of so many frames as one array (n, frames, height, width, 1) in [0, 1], cut when they are asked for.

  They lie in order: those of the first scene from its beginning, then those of the next. They overlap, so that the array
  itself would be as many times as large as the scenes.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, scenes: UInt8[np.ndarray, 's t h w'], frames: int, count: int | None = None):
    self.scenes, self.frames = scenes, frames
    self.each = scenes.shape[1] - frames + 1
    self.count = len(scenes) * self.each if count is None else count

  def __len__(self) -> int:
    return self.count

  @property
  def ndim(self) -> int:
    return 5

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.count, self.frames, *self.scenes.shape[2:], 1)

  def __getitem__(self, rows: Any) -> Float32[np.ndarray, 'b t h w 1'] | Windows:
    """Those of the indices, or for a slice from the first on (what is evaluated) the same array, shorter."""
    if isinstance(rows, slice):
      return Windows(self.scenes, self.frames, len(range(*rows.indices(self.count))))
    scene, start = np.divmod(np.asarray(rows), self.each)
    clips = self.scenes[scene[:, None], start[:, None] + np.arange(self.frames)]
    return clips[..., None].astype(np.float32) / 255


def windows(scenes: Scenes, frames: int) -> Arrays:
  """Clips that each end at a frame, with that frame's label: what a camera has seen when it must decide.

  Raises:
    DataError: scenes are shorter than a clip.
  """
  if frames > scenes.frames.shape[1]:
    raise DataError(f'clips of {frames} frames: scenes have {scenes.frames.shape[1]}; set config.data.frames lower')
  return Arrays(Windows(scenes.frames, frames), scenes.label[:, frames - 1 :].reshape(-1).astype(np.int32))
