"""Sets of videos, prepared as array_record of JPEG frames, and batches of clips cut from them.

Preparing decodes every file once, at a constant rate and a small size. Training then decodes only the frames that a
clip takes, on the host that needs them. Files that cannot be decoded are left out, counted, and listed beside the
records.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Float32, UInt8

from .. import files
from .bands import Crop, Rows, size_of, strip, to_bands
from .batches import Readable, example_batches
from .builders import from_source
from .features import check_features
from .folders import shown
from .layouts import Entry, look
from .origin import check
from .video import VideoError, open_video

Clip = UInt8[np.ndarray, 't h w 3']
_MEAN, _STD = np.array([0.45, 0.45, 0.45], np.float32), np.array([0.225, 0.225, 0.225], np.float32)  # as for Kinetics
SKIPPED = 'skipped.json'


class Videos(tfds.core.GeneratorBasedBuilder):
  """Videos in one of `layouts.LAYOUTS` as JPEG frames, with their class and the spans in which it happens (seconds).

  Each frame is stored as `bands` pictures, from the top down.
  """

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = Path(__file__).parent

  def __init__(self, *, layout: str, source: str, rate: float, short_side: int, bands: int = 1, **kwargs: Any):
    self.layout, self.rate, self.short_side, self.bands = layout, rate, short_side, bands
    self.source = Path(source)
    self.entries, left_out = look(layout, source)
    self.files = len(self.entries) + len(left_out)
    self.skipped = [f'{shown(f.path)}: left out: {f.why}' for f in left_out]
    super().__init__(config=tfds.core.BuilderConfig(name=_name(layout, rate, short_side, bands)), **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'frames': tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
      'label': tfds.features.ClassLabel(names=sorted({e.label for e in self.entries})),
      'spans': tfds.features.Sequence(tfds.features.Tensor(shape=(2,), dtype=np.float32)),
      'name': tfds.features.Text(),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), description=type(self).__doc__)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    splits = sorted({e.split for e in self.entries}, reverse=True)  # train first
    return {s: self._generate_examples([e for e in self.entries if e.split == s]) for s in splits}

  def _generate_examples(self, entries: list[Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
    failed = []
    for entry, result in ahead(self._read, entries, os.cpu_count() or 1):
      if isinstance(result, VideoError):
        failed.append(str(result))
        logging.warning('left out: %s', result)
        continue
      own_rate, frames = result
      spans = np.asarray(entry.spans, np.float32).reshape(-1, 2) / (own_rate if entry.in_frames else 1)
      name = shown('/'.join(entry.path.parts[-2:]))
      yield f'{entry.split}/{shown(entry.path)}', {'frames': frames, 'label': entry.label, 'spans': spans, 'name': name}
    self.skipped += failed
    if len(failed) == len(entries):
      raise VideoError(f'{self.layout}: no video of a split can be decoded; the first: {failed[0]}')

  def made_of(self) -> list[tuple[str, Path]]:
    """Returns the name in the set and the path of every video; see `origin`."""
    name = lambda e: f'{e.path.relative_to(self.source)} {e.split} {e.label} {e.spans}'  # noqa: E731
    return [(name(entry), entry.path) for entry in self.entries]

  def _read(self, entry: Entry) -> tuple[float, list[bytes]] | VideoError:
    try:
      with open_video(entry.path) as film:
        frames = film.frames(rate=self.rate, short_side=self.short_side)
        return film.rate, [band for f in frames for band in to_bands(f, self.bands)]
    except VideoError as error:
      return error


def prepared(
  layout: str, source: str, folder: Path, *, rate: float, short_side: int, bands: int = 1
) -> tfds.core.DatasetBuilder:
  """Returns the builder of a set in the folder, after preparing it from the user's copy in `source` if need be.

  Args:
    layout: one of `LAYOUTS`.
    source: the folder with the user's copy of the videos. It may be gone once the set is prepared.
    folder: where prepared data is kept, see `data_dir`.
    rate: number of frames kept per second.
    short_side: short side of the kept frames, in pixels.
    bands: number of pictures in which each frame is kept, so that a host decodes only the bands of its rows.

  Returns:
    The builder. Its examples have 'frames' (JPEG pictures), 'label', 'spans' (the start and end, in seconds, of what
    the label names, where the set says so) and 'name'.

  Raises:
    DataError: the source has another layout, or the prepared set was made from another source.
    VideoError: no video of a split can be decoded.
  """
  path = folder / 'videos' / _name(layout, rate, short_side, bands) / str(Videos.VERSION)
  if path.is_dir() and not (source and Path(source).is_dir()):  # the source may be gone
    check(layout, path, source, None)
    check_features(path)
    return tfds.builder_from_directory(path)
  options = {'rate': rate, 'short_side': short_side, 'bands': bands}
  builder = Videos(layout=layout, source=source, **options, data_dir=folder, file_format='array_record')
  if not from_source(builder, layout, source, builder.made_of()):
    check_features(path)
    return tfds.builder_from_directory(path)
  files.write(Path(builder.data_path, SKIPPED), json.dumps(builder.skipped, indent=1))
  if builder.skipped:
    words = '%s: %d of %d files are left out; %s lists them'
    logging.warning(words, layout, len(builder.skipped), builder.files, builder.data_path / SKIPPED)
  return builder


def _name(layout: str, rate: float, short_side: int, bands: int) -> str:
  return f'{layout}-{rate:g}fps-{short_side}px' + (f'-{bands}bands' if bands > 1 else '')


def ahead(fn: Callable, items: Sequence[Any], threads: int) -> Iterator[tuple[Any, Any]]:
  """Yields (item, fn(item)) in order, computed by threads; at most twice as many results as threads wait in memory."""
  with ThreadPoolExecutor(threads) as pool:
    waiting: collections.deque = collections.deque()
    for item in items:
      waiting.append((item, pool.submit(fn, item)))
      if len(waiting) > 2 * threads:
        first, future = waiting.popleft()
        yield first, future.result()
    for first, future in waiting:
      yield first, future.result()


def clip_batches(
  source: Sequence[dict[str, Any]],
  batch_size: int,
  *,
  frames: int,
  every: int = 1,
  size: int | tuple[int, int],
  train: bool,
  seed: int = 0,
  flip: bool = True,
  colour: float = 0.0,
  shard: tuple[int, int] = (0, 1),
  bands: int = 1,
  rows: Rows | None = None,
) -> grain.MapDataset:
  """Returns batches of clips {'inputs': (b, frames, height, width, 3), 'label': (b,)}.

  They are to videos what `record_batches` is to images. Pixels x from 0 to 255 become (x / 255 - 0.45) / 0.225.

  Args:
    source: examples with 'frames' (JPEG) and 'label'.
    batch_size: size of the global batch.
    frames: number of frames in a clip. The last frame of a video that is too short stands still.
    every: step between a clip's frames, in frames of the video.
    size: height and width of the clip, in pixels; one number for both.
    train: whether to take random places in time and space, without end; else the middle, in one pass with a `mask`.
    seed: seed of order and augmentation, which depend on nothing else.
    flip: whether half of the clips are mirrored in training.
    colour: the most by which brightness, contrast and saturation change, as a share.
    shard: (index, count) of this process's part of every batch: only its clips are decoded.
    bands: number of pictures in which each frame is kept (see `prepared`).
    rows: the rows of the clips to return; only the bands that they need are decoded. A change of colour needs all rows.

  Raises:
    ValueError: only some rows are asked for, together with a change of colour.
  """
  size = (size, size) if isinstance(size, int) else size
  wanted = (0, size[0]) if rows is None else (rows[0], min(rows[1], size[0]))
  if colour and wanted != (0, size[0]):
    raise ValueError('a change of colour is of whole clips; set colour=0 where a host loads some of their rows')

  def taken(encoded: Sequence[bytes], chosen: np.ndarray, crop: Crop) -> Clip:
    clips = {i: strip(encoded[i * bands : (i + 1) * bands], crop, size, wanted) for i in np.unique(chosen)}
    return np.stack([clips[i] for i in chosen])

  def random(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    encoded = example['frames']
    chosen = places(len(encoded) // bands, frames, every, rng)
    crop = random_crop(size_of(encoded[:bands]), size[1] / size[0], rng, flip)
    clip = taken(encoded, chosen, crop)
    return _finished(coloured(clip, *rng.uniform(1 - colour, 1 + colour, 3)) if colour else clip, example['label'])

  def middle(example: dict[str, Any]) -> dict[str, Any]:
    encoded = example['frames']
    crop = middle_crop(size_of(encoded[:bands]), size[1] / size[0])
    return _finished(taken(encoded, places(len(encoded) // bands, frames, every), crop), example['label'])

  return example_batches(Readable(source), batch_size, random if train else None, middle, seed=seed, shard=shard)


def places(length: int, count: int, every: int, rng: np.random.Generator | None = None) -> np.ndarray:
  """Returns the `count` frames of a video that a clip takes, one in `every`, of `length` frames in all.

  They start at a random place or, without a generator, lie in the middle. The last frame of a short video repeats.
  """
  spare = max(0, length - (count - 1) * every - 1)
  start = spare // 2 if rng is None else int(rng.integers(spare + 1))
  return np.minimum(start + every * np.arange(count), length - 1)


def random_crop(frame: tuple[int, int], aspect: float, rng: np.random.Generator, flip: bool = True) -> Crop:
  """Draws a part of frames of this height and width, with a quarter of the area or more; half are mirrored.

  aspect: width over height of the final clip. That of the part is 3/4 to 4/3 of it.
  """
  height, width = frame
  area = height * width * rng.uniform(0.25, 1)
  ratio = aspect * np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
  w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
  left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
  return Crop(int(top), int(left), h, w, bool(flip and rng.random() < 0.5))


def middle_crop(frame: tuple[int, int], aspect: float = 1.0) -> Crop:
  """Returns the largest crop in the middle whose width is `aspect` times its height."""
  height, width = frame
  h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
  return Crop((height - h) // 2, (width - w) // 2, h, w)


def coloured(clip: Clip, brightness: float, contrast: float, saturation: float) -> Clip:
  """Multiplies a clip's brightness, contrast and saturation by factors, of which 1 changes nothing.

  Contrast is the distance to the clip's mean, and saturation the distance to each pixel's grey.
  """
  x = clip.astype(np.float32) * np.float32(brightness)
  x = (x - x.mean()) * np.float32(contrast) + x.mean()
  grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
  x = (x - grey[..., None]) * np.float32(saturation) + grey[..., None]
  return np.clip(x, 0, 255).round().astype(np.uint8)


def centre_crop(clip: Clip, size: int) -> Clip:
  """Cuts the largest square from the middle of a clip and resizes it."""
  from PIL import Image

  top, left, h, w, _ = middle_crop(clip.shape[1:3])
  square = clip[:, top : top + h, left : left + w]
  return np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BILINEAR)) for f in square])


def normalised(clip: Clip) -> Float32[np.ndarray, 't h w 3']:
  return (clip.astype(np.float32) / 255 - _MEAN) / _STD


def _finished(clip: Clip, label: Any) -> dict[str, Any]:
  return {'inputs': normalised(clip), 'label': np.int32(label)}
