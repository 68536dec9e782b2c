"""Search by example in a folder of videos: shots, their embeddings, and an index."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from ... import data, files
from ...data import clips, video
from ...data.shots import Shot, shots
from ...extras import load
from ...train import jsonfile
from ...train.checkpoints import load_export
from ...train.errors import ConfigError
from ...train.registry import make_task
from ..gan.judge import before_logits

Pixels = UInt8[np.ndarray, 't h w 3']
Vectors = Float[np.ndarray, 'n d']
_GRID = 4  # cells per side in the layout of colours
_FAINT = 4.0  # standard deviation of a frame's colours, of 255, below which it is of one colour
_THUMB = 128  # pixels, the longer side
_MANY = 50_000  # from this number of shots on, the index is approximate


class Embedding(NamedTuple):
  """A way to turn a shot into a vector of length 1.

  frames: the number of frames of a clip. of: clips (each of that many frames) -> vectors. name: shown on the page.
    mark: what else the vector depends on.
  """

  frames: int
  every: int
  rate: float
  short_side: int
  of: Callable[[list[Pixels]], Vectors]
  name: str
  mark: str


class Entry(NamedTuple):
  """A shot of the library, with times in seconds and thumbnails in JPEG."""

  film: str
  begins: float
  ends: float
  vector: Float[np.ndarray, ' d']
  thumbs: list[bytes]


def layout() -> Embedding:
  """Returns an embedding without a network: the colours of a grid over the middle frame, less their mean.

  A frame that is nearly of one colour, such as a black one, has the vector zero: its small differences are noise.
  """

  def of(pixels: list[Pixels]) -> Vectors:
    small = [np.asarray(Image.fromarray(c[len(c) // 2]).resize((_GRID, _GRID), Image.Resampling.BOX)) for c in pixels]
    vectors = np.stack(small).reshape(len(small), -1).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    return unit(np.where(vectors.std(1, keepdims=True) < _FAINT, 0, vectors))

  return Embedding(1, 1, 5.0, 128, of, 'the colours of the middle frame alone', 'layout')


def network(run: str | Path) -> Embedding:
  """Returns an embedding by a trained network: its values before the logits, on the middle clip of a shot.

  Raises:
    ConfigError: the folder holds no finished run of a network of clips.
  """
  variables, about = load_export(Path(run) / 'export')
  config = ConfigDict(about['config'])
  task = make_task(config)
  shape = about.get('example', ())
  if len(shape) != 4:
    raise ConfigError(f'{run}: its network sees examples of {tuple(shape)}, not clips; train one on clips')
  frames, height, width, channels = shape

  def input_of(clip: Pixels) -> np.ndarray:
    if channels == 3:
      return clips.normalised(clips.centre_crop(clip, height))
    grey = [Image.fromarray(f).convert('L').resize((width, height), Image.Resampling.BILINEAR) for f in clip]
    return np.stack(grey)[..., None].astype(np.float32) / 255

  features = jax.jit(functools.partial(before_logits, task.model, variables))

  def of(pixels: list[Pixels]) -> Vectors:
    return unit(np.concatenate([np.asarray(features(input_of(clip)[None])) for clip in pixels]))

  layered = config.data.name in data.LAYOUTS
  settings = (config.data.every, config.data.rate, config.data.short_side) if layered else (1, 10.0, 128)
  mark = f'{Path(run).absolute()} {about["step"]} {config.to_json()}'
  return Embedding(frames, *settings, of, f'{config.model.name} of {run}', mark)


def unit(vectors: Vectors) -> Vectors:
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def film_shots(path: Path, embedding: Embedding, threshold: float) -> Iterator[tuple[Shot, Float[np.ndarray, ' d']]]:
  """Yields the shots of a file, each with its vector.

  Raises:
    VideoError: the file cannot be decoded.
  """
  with video.open_video(path) as film:
    frames = film.frames(rate=embedding.rate, short_side=embedding.short_side)
    for shot in shots(frames, embedding.rate, threshold=threshold):
      yield shot, embedding.of([middle(shot.frames, embedding)])[0]


def middle(frames: Sequence[UInt8[np.ndarray, 'h w 3']], embedding: Embedding) -> Pixels:
  """Returns the middle clip of a shot; a shot that is too short repeats its last frame."""
  spare = max(0, len(frames) - (embedding.frames - 1) * embedding.every - 1)
  chosen = spare // 2 + embedding.every * np.arange(embedding.frames)
  return np.stack([frames[i] for i in np.minimum(chosen, len(frames) - 1)])


def library(
  videos: Path, embedding: Embedding, kept: Path, threshold: float, say: Callable[[str], None] = print
) -> tuple[list[Entry], list[str]]:
  """Returns all shots in a folder of videos and its subfolders, links included, and the files that were left out.

  The results for each file are kept in `kept`, and made again if the file, the network or the threshold has changed.

  Raises:
    ConfigError: no file of the folder can be decoded.
  """
  kept.mkdir(parents=True, exist_ok=True)
  entries, skipped = [], []
  paths, others = data.files_below(videos, video.ENDINGS)
  for path in paths:
    stat = path.stat()
    mark = f'{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {threshold} {embedding.mark}'
    record = kept / f'{hashlib.sha256(os.fsencode(mark)).hexdigest()[:24]}.json'
    rows = read_record(record)
    if rows is None:
      say(f'cutting {data.shown(path.relative_to(videos))}')
      try:
        rows = [_row(shot, vector, embedding.rate) for shot, vector in film_shots(path, embedding, threshold)]
      except video.VideoError as error:
        skipped.append(str(error))
        continue
      files.write(record, jsonfile.dumps(rows))
    entries += [_entry(str(path.relative_to(videos)), row) for row in rows]
  skipped += [f'{data.shown(other.path)}: no film ({other.why})' for other in others]
  if not entries:
    first = f'; the first: {skipped[0]}' if skipped else ''
    count = len(paths) + len(others)
    raise ConfigError(f'{data.shown(videos)}: no file of {count} is a video that can be decoded{first}')
  return entries, skipped


def read_record(path: Path) -> list[dict[str, Any]] | None:
  """Reads a record; returns None if it does not exist or is damaged."""
  try:
    return jsonfile.read(path)
  except (OSError, ValueError):
    return None


def _row(shot: Shot, vector: np.ndarray, rate: float) -> dict[str, Any]:
  shown = [shot.frames[i] for i in np.linspace(0, len(shot.frames) - 1, 5).astype(int)[1:-1]]
  return {
    'begins': shot.first / rate,
    'ends': (shot.first + len(shot.frames)) / rate,
    'vector': _packed(vector.astype('<f4').tobytes()),
    'thumbs': [_packed(thumbnail(frame)) for frame in shown],
  }


def _entry(film: str, row: dict[str, Any]) -> Entry:
  vector = np.frombuffer(base64.b64decode(row['vector']), '<f4')
  return Entry(film, row['begins'], row['ends'], vector, [base64.b64decode(t) for t in row['thumbs']])


def _packed(raw: bytes) -> str:
  return base64.b64encode(raw).decode()


def thumbnail(frame: UInt8[np.ndarray, 'h w 3']) -> bytes:
  image = Image.fromarray(frame)
  image.thumbnail((_THUMB, _THUMB))
  return video.to_jpeg(np.asarray(image), quality=80)


def nearest(vectors: Vectors, query: Vectors, top: int) -> tuple[Float[np.ndarray, 'q k'], np.ndarray]:
  """Returns (cosines, rows) of the vectors nearest to each query, best first.

  The search by faiss is exact, or uses HNSW if there are many vectors.

  Raises:
    MissingExtra: faiss is not installed.
  """
  faiss = load('video', 'faiss')
  faiss.omp_set_num_threads(min(4, os.cpu_count() or 1))
  kind = 'Flat' if len(vectors) < _MANY else 'HNSW32'
  index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
  index.add(np.ascontiguousarray(vectors, np.float32))
  return index.search(np.ascontiguousarray(query, np.float32), min(top, len(vectors)))
