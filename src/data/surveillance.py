"""Pedestrians on a real film, with anomalies that are injected into it.

The film is OpenCV's vtest.avi (795 frames, 10 a second), at 96x72 in grey. Scenes of 48 frames are cut from three
stretches of it that share no frame: training, validation, test. Two thirds of the scenes get one event:

| Kind | |
|---|---|
| `runner` | somebody cut out of the film crosses it at 3 to 5 pixels a frame (walkers: less than 1) |
| `vehicle` | a drawn car drives through at 1.5 to 4 pixels a frame |
| `fall` | somebody who has walked normally falls within four frames and stays down |
| `shake` | the camera is pushed by up to 3 pixels in each direction in every frame |
| `ball` | a ball flies through, only in the test split |
| `smoke` | a cloud grows, only in the test split |

The label of a frame is 1 while the event can be seen. Whatever is not an event happens in normal scenes too. Half of
them get a walker who is cut out in the same way, so that being pasted is no sign of an event. In all scenes the
brightness drifts and the sensor has noise. Nothing in these films is a real incident.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from .errors import DataError
from .scenes import Scene, SceneBuilder, generator
from .video import read_video

VTEST_DEBIAN = '/usr/share/doc/opencv-doc/examples/data/vtest.avi'
FRAMES, HEIGHT, WIDTH = 48, 72, 96
STRETCHES = {'train': (0, 450), 'validation': (450, 530), 'test': (545, 795)}  # frames of the film
TRAINED = ('runner', 'vehicle', 'fall', 'shake')
HELD_OUT = ('ball', 'smoke')
BEGINS = (12, 28)  # the event begins between these frames

Field = Float[np.ndarray, 'h w']


class Sprite(NamedTuple):
  """A picture to paste: its brightness, and how much it covers what is behind, from 0 to 1."""

  pixels: Field
  cover: Field


class Surveillance(SceneBuilder):
  """300, 60 and 180 scenes of vtest.avi, two thirds of them with an injected anomaly; see data/surveillance.py."""

  KINDS = ('normal', *TRAINED, *HELD_OUT)
  SHAPE = (FRAMES, HEIGHT, WIDTH)
  RATE = 10.0
  COUNT = {'train': 300, 'validation': 60, 'test': 180}  # noqa: RUF012

  def __init__(self, *, source: str = '', **kwargs: Any):
    self.source = Path(source or VTEST_DEBIAN)
    self.film: UInt8[np.ndarray, 't h w'] | None = None
    self.walkers: dict[str, list[Sprite]] = {}
    super().__init__(**kwargs)

  def scene(self, split: str, i: int) -> Scene:
    if self.film is None:
      frames = read_video(self.source, rate=self.RATE, short_side=HEIGHT).frames
      if frames.shape[1:3] != (HEIGHT, WIDTH) or len(frames) < STRETCHES['test'][1]:
        wanted = f'{STRETCHES["test"][1]} frames of 4:3'
        raise DataError(f'{self.source}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}, not {wanted}')
      self.film = frames.mean(-1).round().astype(np.uint8)
      self.walkers = {name: cut_out(self.film[slice(*part)]) for name, part in STRETCHES.items()}
    kinds = TRAINED if split != 'test' else TRAINED + HELD_OUT
    rng = generator(split, i)
    first, last = STRETCHES[split]
    start = rng.integers(first, last - FRAMES + 1)
    frames = self.film[start : start + FRAMES].astype(np.float64)
    kind = 'normal' if i % 3 == 0 else kinds[(i - i // 3 - 1) % len(kinds)]
    return injected(frames, kind, self.walkers[split], rng)


def cut_out(film: UInt8[np.ndarray, 't h w']) -> list[Sprite]:
  """Cuts people out of a film: everything that differs from the median, has their size and stands by itself."""
  from scipy import ndimage

  background = np.median(film[::5], axis=0)
  clips = []
  for frame in film[::5]:
    apart = np.abs(frame - background) > 30
    labels, _ = ndimage.label(ndimage.binary_closing(apart))
    for number, place in enumerate(ndimage.find_objects(labels), 1):
      (top, bottom), (left, right) = ((s.start, s.stop) for s in place)
      inside = top > 1 and left > 1 and bottom < HEIGHT - 1 and right < WIDTH - 1
      if inside and 12 <= bottom - top <= 24 and 4 <= right - left <= (bottom - top) * 0.6:
        cover = ndimage.gaussian_filter((labels[place] == number).astype(float), 0.4)
        clips.append(Sprite(frame[place].astype(float), np.clip(1.3 * cover, 0, 1)))
  if not clips:
    raise DataError('no people were found in the film to cut out')
  return clips


def injected(frames: Float[np.ndarray, 't h w'], kind: str, walkers: list[Sprite], rng: np.random.Generator) -> Scene:
  """Makes a scene of the frames with an event of the kind, or, for half of the normal ones, with one more walker."""
  begin = int(rng.integers(*BEGINS))
  label = np.zeros(len(frames), np.uint8)
  if kind == 'normal':
    if rng.random() < 0.5:
      walk(frames, walkers, rng, falls=len(frames))
  elif kind == 'fall':
    label[begin:] = walk(frames, walkers, rng, falls=begin)[begin:]
  elif kind == 'shake':
    last = begin + int(rng.integers(8, 17))
    for t in range(begin, last):
      frames[t] = shifted(frames[t], rng.integers(-3, 4, 2))
    label[begin:last] = 1
  elif kind == 'smoke':
    label[begin:] = smoke(frames, begin, rng)
  else:
    label[begin:] = cross(frames, begin, kind, walkers, rng)
  drift = 1 + rng.uniform(0, 0.06) * np.sin(rng.uniform(0, 6.3) + 0.1 * np.arange(len(frames)))
  frames = frames * drift[:, None, None] + rng.normal(0, 1.5, frames.shape)
  return Scene(np.clip(frames, 0, 255).round().astype(np.uint8), label, kind)


def cross(
  frames: Float[np.ndarray, 't h w'], begin: int, kind: str, walkers: list[Sprite], rng: np.random.Generator
) -> UInt8[np.ndarray, ' d']:
  """Draws a runner, a vehicle or a ball that goes from side to side; returns where it is seen, from `begin` on."""
  feet = rng.uniform(34, 68)
  rightwards = rng.random() < 0.5
  if kind == 'runner':
    sprite, speed = sized(walkers[rng.integers(len(walkers))], tall(feet)), rng.uniform(3, 5)
  elif kind == 'vehicle':
    sprite, speed = car(tall(feet), rng), rng.uniform(1.5, 4)
  else:
    sprite, speed = ball(rng), rng.uniform(3, 6)
  if not rightwards:
    sprite = Sprite(*(x[:, ::-1] for x in sprite))
  width = sprite.pixels.shape[1]
  # It starts at the edge or elsewhere, as if it came out of a door or from behind the camera.
  start = -width / 2 if rng.random() < 0.5 else rng.uniform(0, WIDTH * 0.6)
  up, seen = rng.uniform(3, 6), []
  for k in range(len(frames) - begin):
    along = start + k * speed
    left = along - width / 2 if rightwards else WIDTH - along - width / 2
    height = {'runner': float(k % 2), 'vehicle': 0.0, 'ball': up * k - 0.25 * k * k}[kind]
    seen.append(paste(frames[begin + k], sprite, feet - height - sprite.pixels.shape[0], left))
  return np.asarray(seen, np.uint8)


def walk(
  frames: Float[np.ndarray, 't h w'], walkers: list[Sprite], rng: np.random.Generator, falls: int
) -> UInt8[np.ndarray, ' t']:
  """Draws somebody who walks and, from frame `falls` on, falls within four frames; returns where they are seen."""
  from scipy import ndimage

  feet, place = rng.uniform(36, 68), rng.uniform(20, WIDTH - 20)
  speed = rng.uniform(0.3, 0.9) * rng.choice([-1, 1])
  standing = sized(walkers[rng.integers(len(walkers))], tall(feet))
  seen = []
  for t, frame in enumerate(frames):
    sprite, fallen = standing, np.clip((t - falls + 1) / 4, 0, 1)
    if fallen:
      sprite = Sprite(*(ndimage.rotate(x, 90 * fallen * np.sign(speed), order=1) for x in standing))
    else:
      place += speed
    height, width = sprite.pixels.shape
    seen.append(paste(frame, sprite, feet - height, place - width / 2))
  return np.asarray(seen, np.uint8)


def smoke(frames: Float[np.ndarray, 't h w'], begin: int, rng: np.random.Generator) -> UInt8[np.ndarray, ' d']:
  """Draws a bright cloud that grows and moves upwards; returns where it is seen, from its third frame on."""
  y, x = np.mgrid[:HEIGHT, :WIDTH]
  at, grey = (rng.uniform(30, 66), rng.uniform(12, WIDTH - 12)), rng.uniform(150, 230)
  count = len(frames) - begin
  for k in range(count):
    size = 2 + 0.5 * k
    cloud = np.exp(-(((y - at[0] + 0.5 * k) / size) ** 2 + ((x - at[1]) / (0.7 * size)) ** 2) / 2)
    cover = min(0.08 * (k + 1), 0.8) * cloud * rng.uniform(0.85, 1, cloud.shape)
    frames[begin + k] += cover * (grey - frames[begin + k])
  return (np.arange(count) >= 2).astype(np.uint8)


def tall(feet: float) -> float:
  """Returns the height in pixels of people whose feet are in this row, as measured on the film."""
  return 4 + 0.26 * feet


def sized(sprite: Sprite, height: float) -> Sprite:
  from scipy import ndimage

  factor = height / sprite.pixels.shape[0]
  return Sprite(*(ndimage.zoom(x, factor, order=1) for x in sprite))


def car(person: float, rng: np.random.Generator) -> Sprite:
  """Draws a car from its side, driving right: 0.85 times as tall as a person, and 2.4 times as long as tall."""
  height = round(0.85 * person)
  length = round(2.4 * height)
  body, pixels, cover = rng.uniform(20, 240), np.zeros((height, length)), np.zeros((height, length))
  cover[height // 2 : -max(1, height // 6)] = 1
  cover[:, length // 5 : -length // 3] = 1
  pixels[:] = body
  pixels[height // 8 : height // 2, length // 4 : -length // 3] = 0.4 * body
  for wheel in (length // 5, length - length // 4):
    part = np.s_[-max(2, height // 3) :, wheel - height // 6 : wheel + height // 6 + 1]
    pixels[part], cover[part] = 15, 1
  return Sprite(pixels, cover)


def ball(rng: np.random.Generator) -> Sprite:
  radius = rng.uniform(1.5, 3)
  y, x = np.mgrid[-4:5, -4:5]
  cover = np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)
  return Sprite(np.full(cover.shape, rng.choice([20.0, 235.0])), cover)


def paste(frame: Field, sprite: Sprite, top: float, left: float) -> bool:
  """Draws the sprite into the frame at a place between pixels; returns whether a quarter of it lies inside."""
  from scipy import ndimage

  row, column = int(np.floor(top)), int(np.floor(left))
  padded = [np.pad(x, ((0, 1), (0, 1)), mode='edge' if i == 0 else 'constant') for i, x in enumerate(sprite)]
  pixels, cover = (ndimage.shift(x, (top - row, left - column), order=1, mode='nearest') for x in padded)
  height, width = cover.shape
  inside = np.s_[max(0, row) : max(0, row + height), max(0, column) : max(0, column + width)]
  target = frame[inside]
  rows, columns = max(0, -row), max(0, -column)
  region = np.s_[rows : rows + target.shape[0], columns : columns + target.shape[1]]
  target += cover[region] * (pixels[region] - target)
  return bool(target.size and cover[region].sum() > 0.25 * cover.sum())


def shifted(frame: Field, by: np.ndarray) -> Field:
  """Moves a frame by whole pixels and repeats its border."""
  rows = np.clip(np.arange(HEIGHT) + by[0], 0, HEIGHT - 1)
  columns = np.clip(np.arange(WIDTH) + by[1], 0, WIDTH - 1)
  return frame[rows[:, None], columns]
