"""Scenes: short films of one fixed length, with a label for every frame that says whether an alarm is right there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32, UInt8

from .datasets import Arrays
from .errors import DataError

CHANGE = 4.0
SPLITS = ('train', 'validation', 'test')


class Scene(NamedTuple):
  """A film of grey frames, a label for each (1: an alarm is right, 0: it is false), and one of the builder's kinds."""

  frames: UInt8[np.ndarray, 't h w']
  label: UInt8[np.ndarray, ' t']
  kind: str


class Scenes(NamedTuple):
  """Holds a split of scenes: short grey films of one length, with a label for every frame.

  Attributes:
    frames: the brightness of every pixel.
    label: 1 for a frame at which an alarm is right, 0 for one at which it is false.
    kind: the kind of each scene, a number.
    kinds: the names of the values of `kind`.
    rate: frames in a second.
  """

  frames: UInt8[np.ndarray, 's t h w']
  label: UInt8[np.ndarray, 's t']
  kind: Int32[np.ndarray, ' s']
  kinds: tuple[str, ...]
  rate: float


class SceneBuilder(tfds.core.GeneratorBasedBuilder):
  """The common part of all sets of scenes. A subclass defines KINDS, SHAPE, RATE and COUNT, and scene(split, i)."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = Path(__file__).parent
  KINDS: tuple[str, ...]
  SHAPE: tuple[int, int, int]  # time, height, width
  RATE: float
  COUNT: dict[str, int]

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
  """Returns the random generator from which scene i of a split is drawn."""
  return np.random.default_rng((0, SPLITS.index(split), i))


def read(builder: SceneBuilder, split: str) -> Scenes:
  """Reads a split of a prepared set."""
  records = builder.as_data_source(split=split)
  examples = records.__getitems__(range(len(records)))
  frames, label, kind = (np.stack([e[name] for e in examples]) for name in ('frames', 'label', 'kind'))
  return Scenes(frames, label, kind.astype(np.int32), builder.KINDS, builder.RATE)


def shrunken(scenes: Scenes, short_side: int) -> Scenes:
  """Returns scenes whose shorter side has `short_side` pixels, each the mean of a square of old ones.

  Args:
    scenes: the scenes to shrink.
    short_side: the new length of the shorter side, in pixels.

  Raises:
    DataError: the sides do not divide.
  """
  s, t, h, w = scenes.frames.shape
  factor = min(h, w) // short_side
  if factor < 1 or min(h, w) != factor * short_side or max(h, w) % factor:
    raise DataError(f'frames of {w}x{h} do not shrink to a short side of {short_side}; set config.data.short_side')
  frames = scenes.frames.reshape(s, t, h // factor, factor, w // factor, factor).mean((3, 5), dtype=np.float32)
  return scenes._replace(frames=frames.round().astype(np.uint8))


class Windows:
  """Clips of scenes as one array (n, frames, height, width, 4), cut when they are asked for.

  Clips overlap, so the array itself would be many times as large as the scenes. The channels are:
  - brightness, with mean 0 and deviation 1 in each clip, because light and haze say nothing of what goes on;
  - CHANGE times the change of brightness since the scene's frame before, because little of a picture moves;
  - a pixel's distance from the middle column, which a mirror keeps, and its row, both from -1 to 1 (Liu et al. 2018).
    Without them a network that ends in a mean over space can hardly tell what is in the way from what is beside it.
  """

  dtype = np.dtype(np.float32)
  ndim = 5

  def __init__(
    self, scenes: UInt8[np.ndarray, 's t h w'], scene: np.ndarray, last: np.ndarray, frames: int, every: int
  ):
    self.scenes, self.scene, self.last = scenes, scene, last
    self.offsets = every * np.arange(1 - frames, 1)

  def __len__(self) -> int:
    return len(self.scene)

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self), len(self.offsets), *self.scenes.shape[2:], 4)

  def __getitem__(self, rows: Any) -> Float32[np.ndarray, 'b t h w 4'] | Windows:
    """Returns the clips with these indices; for a slice they are not cut yet."""
    if isinstance(rows, slice):
      every = int(np.diff(self.offsets)[0]) if len(self.offsets) > 1 else 1
      return Windows(self.scenes, self.scene[rows], self.last[rows], len(self.offsets), every)
    scene, at = self.scene[rows][:, None], self.last[rows][:, None] + self.offsets
    clips, before = (self.scenes[scene, t].astype(np.float32) for t in (at, np.maximum(at - 1, 0)))
    middle, spread = (f((1, 2, 3), keepdims=True) for f in (clips.mean, clips.std))
    row, column = (np.linspace(-1, 1, n, dtype=np.float32) for n in clips.shape[2:])
    seen = [(clips - middle) / (spread + 1), CHANGE * (clips - before) / (spread + 1)]
    where = [np.broadcast_to(2 * np.abs(column) - 1, clips.shape), np.broadcast_to(row[:, None], clips.shape)]
    return np.stack(seen + where, -1)


def windows(scenes: Scenes, frames: int, every: int = 1, *, balanced: bool = False) -> Arrays:
  """Makes clips that each end at a frame and have that frame's label.

  A clip is what a camera has seen when it must decide.

  Args:
    scenes: a split.
    frames: number of frames in a clip.
    every: step between them, in frames of the scene.
    balanced: whether clips of the rarer label are repeated until there are as many as of the other. If not, clips are
      in the order of scenes and of time in them.

  Returns:
    An `Arrays` with clips (n, frames, h, w, 4), which are cut when they are indexed, and labels (n,). The four channels
    are brightness (mean 0 and deviation about 1 in each clip), four times its change since the frame before, a pixel's
    distance from the middle column, and its row (both from -1 to 1).

  Raises:
    DataError: scenes are shorter than a clip.
  """
  count, first = scenes.frames.shape[1], (frames - 1) * every
  if first >= count:
    raise DataError(
      f'clips of {frames} frames, one of {every}, are longer than scenes of {count}; set config.data.frames lower'
    )
  scene, last = (x.ravel() for x in np.indices((len(scenes.frames), count - first)))
  last = last + first
  label = scenes.label[scene, last].astype(np.int32)
  if balanced:
    rare = np.flatnonzero(label == (label.mean() < 0.5))
    more = np.resize(rare, max(0, len(label) - 2 * len(rare)) if len(rare) else 0)
    scene, last, label = (np.concatenate([x, x[more]]) for x in (scene, last, label))
  return Arrays(Windows(scenes.frames, scene, last, frames, every), label)
