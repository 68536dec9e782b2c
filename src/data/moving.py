"""Moving Fashion-MNIST: clips whose classes are motions, of garments that tell nothing about them.

A garment moves in one of eight directions, or turns in one of two. Its place and angle are uniform in every frame of
every class (it leaves at one side and comes in at the other). So no single frame says more than chance, and no set of
frames without their order tells a motion from its opposite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, UInt8

from .builders import FASHION_MNIST_DEBIAN, FashionMnistIdx, read_idx

FRAMES, SIDE = 8, 32
DIRECTIONS = ('right', 'down right', 'down', 'down left', 'left', 'up left', 'up', 'up right')
MOTIONS = (*DIRECTIONS, 'clockwise', 'anticlockwise')
_COUNT = {'train': 12000, 'test': 2000}
_SPEED = (1.0, 3.0)  # pixels a frame
_TURN = (10.0, 30.0)  # degrees a frame


class MovingFashionMnist(tfds.core.GeneratorBasedBuilder):
  """12,000 and 2,000 clips of 8 frames of 32x32 in ten motions; garments come from Fashion-MNIST's same split."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = Path(__file__).parent

  def __init__(self, *, source: str = FASHION_MNIST_DEBIAN, **kwargs: Any):
    self.source = Path(source)
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Tensor(shape=(FRAMES, SIDE, SIDE, 1), dtype=np.uint8)
    label = tfds.features.ClassLabel(names=list(MOTIONS))
    features = tfds.features.FeaturesDict({'image': image, 'label': label})
    return self.dataset_info_from_configs(features=features, description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in _COUNT}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    garments = read_idx(self.source / FashionMnistIdx.images_of(split))
    for i in range(_COUNT[split]):
      rng = np.random.default_rng((0, split == 'test', i))
      label = i % len(MOTIONS)
      yield i, {'image': moving(garments[rng.integers(len(garments))], label, rng), 'label': label}


def moving(
  garment: UInt8[np.ndarray, 'h w'], label: int, rng: np.random.Generator, frames: int = FRAMES, upright: bool = False
) -> UInt8[np.ndarray, 't h w 1']:
  """Draws a clip of the motion `MOTIONS[label]`, with a random start, angle and speed.

  upright: whether garments that do not turn stand upright.
  """
  place, angle = rng.uniform(0, SIDE, 2), rng.uniform(0, 2 * np.pi)
  angle = 0.0 if upright and label < len(DIRECTIONS) else angle
  speed, turn = rng.uniform(*_SPEED), np.deg2rad(rng.uniform(*_TURN))
  step, turns = np.zeros(2), 0.0
  if label < len(DIRECTIONS):
    way = 2 * np.pi * label / len(DIRECTIONS)
    step = speed * np.array([np.sin(way), np.cos(way)])  # down, right
  else:
    turns = turn if MOTIONS[label] == 'clockwise' else -turn
  return np.stack([drawn(garment, place + k * step, angle + k * turns) for k in range(frames)])[..., None]


def drawn(garment: UInt8[np.ndarray, 'h w'], place: Float[np.ndarray, '2'], angle: float) -> UInt8[np.ndarray, 's s']:
  """Draws a frame with the garment's centre at `place` (down, right), turned clockwise by `angle`.

  The field wraps around.
  """
  from scipy import ndimage

  field = np.zeros((SIDE, SIDE), np.float32)
  at = (SIDE - garment.shape[0]) // 2
  field[at : at + garment.shape[0], at : at + garment.shape[1]] = garment
  c, s = np.cos(angle), np.sin(angle)
  centre = np.full(2, (SIDE - 1) / 2)
  # The garment is turned about the centre first and then moved: turning it after it has wrapped around would cut it.
  turning = np.array([[c, -s], [s, c]])  # from a place in the frame to one in the field; rows run downwards
  turned = ndimage.affine_transform(field, turning, centre - turning @ centre, order=1)
  return np.clip(ndimage.shift(turned, place - centre, order=1, mode='grid-wrap'), 0, 255).round().astype(np.uint8)
