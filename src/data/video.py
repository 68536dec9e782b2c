"""Frames of video files, at a constant rate whatever the file's own, and files of frames."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from .datasets import DataError

_WHOLE = 0.8  # a file that says how long it is must decode to this share of it
_SOUND = 0.9  # this share of its frames must be without known damage
_LONGEST_SIDE = 16384


class VideoError(DataError):
  """A file that is no video, or one that cannot be decoded; one line that names it."""


class Video(NamedTuple):
  """frames: (time, height, width, 3), RGB; rate: frames in a second."""

  frames: UInt8[np.ndarray, 't h w 3']
  rate: float


class Film(NamedTuple):
  """An opened file. rate: its own mean frames in a second; 0 where it is not known."""

  container: Any
  stream: Any
  rate: float
  name: str

  def frames(
    self, *, rate: float = 0.0, short_side: int = 0, longest: float = math.inf
  ) -> Iterator[UInt8[np.ndarray, 'h w 3']]:
    """Those of `read_video`, one after the other: no more than one waits in memory."""
    rate = rate or self.rate
    if not 0 < rate < 1000:
      raise VideoError(f'{self.name}: its frame rate is not known; give one by rate=')
    frame, picture, begins, first, k = None, None, 0.0, None, 0
    decoded = damaged = 0
    size = None
    for after in self.container.decode(self.stream):
      # Files without time stamps run at their own mean rate.
      begins = after.time if after.time is not None else decoded / (self.rate or rate)
      first = begins if first is None else first
      begins -= first
      size = size or _size(after, short_side, self.name)  # of the first: a stream may change its own
      decoded, damaged = decoded + 1, damaged + bool(after.is_corrupt)
      while frame is not None and k / rate < min(begins - 1e-6, longest):
        picture = _pixels(frame, size) if picture is None else picture
        yield picture
        k += 1
      if k / rate >= longest:
        break
      frame, picture = after, None
    if frame is None:
      raise VideoError(f'{self.name}: not one frame can be decoded')
    if k / rate < longest:
      lasts = begins + 1 / (self.rate or rate)
      picture = _pixels(frame, size) if picture is None else picture
      while k == 0 or k / rate < min(lasts, longest) - 1e-6:
        yield picture
        k += 1
      # Matroska says it of the file alone, in microseconds.
      stated = self.stream.duration
      says = float(stated * self.stream.time_base if stated else (self.container.duration or 0) / 1e6)
      if min(says, longest) * _WHOLE > lasts + 1 / rate:
        raise VideoError(f'{self.name}: is cut off or damaged: {lasts:.1f} of its {says:.1f} seconds can be decoded')
    if damaged > (1 - _SOUND) * decoded:
      raise VideoError(f'{self.name}: is damaged: {damaged} of {decoded} frames')


@contextlib.contextmanager
def open_video(source: str | Path | bytes, name: str = '') -> Iterator[Film]:
  """Opens a file, by PyAV (FFmpeg), and turns what goes wrong while it is read into one line.

  Args:
    source: a path, or what is in the file.
    name: for messages, where the source is no path.

  Raises:
    VideoError: no such file, not a video (empty, only sound), or damaged.
  """
  import av

  name = name or (f'{len(source)} bytes' if isinstance(source, bytes) else str(source))
  try:
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    with av.open(opened, metadata_errors='replace') as container:
      stream = next(iter(container.streams.video), None)
      if stream is None:
        kinds = ', '.join(sorted({s.type for s in container.streams})) or 'nothing'
        raise VideoError(f'{name}: no video in it, only {kinds}')
      stream.thread_type = 'AUTO'
      yield Film(container, stream, float(stream.average_rate or stream.guessed_rate or 0), name)
  except VideoError:
    raise
  except (av.error.FFmpegError, OSError, ValueError, MemoryError, OverflowError) as error:
    words = (str(getattr(error, 'strerror', None) or error).splitlines() or [type(error).__name__])[0]
    raise VideoError(f'{name}: cannot be decoded: {words[:150]}') from error


def read_video(
  source: str | Path | bytes, *, rate: float = 0.0, short_side: int = 0, longest: float = math.inf, name: str = ''
) -> Video:
  """All frames of a file.

  Frame k is the one that is shown k / rate seconds after the first: of variable rates too.

  Args:
    source: a path, or what is in the file.
    rate: frames in a second; 0: the file's own mean.
    short_side: pixels; frames are resized to it, their shape kept; 0: as they are.
    longest: seconds, from the start.
    name: for messages, where the source is no path.

  Raises:
    VideoError: as `open_video`, or the file is shorter than it says.
  """
  with open_video(source, name) as film:
    frames = list(film.frames(rate=rate, short_side=short_side, longest=longest))
    return Video(np.stack(frames), rate or film.rate)


def _pixels(frame: Any, size: tuple[int, int]) -> UInt8[np.ndarray, 'h w 3']:
  return frame.to_ndarray(format='rgb24', width=size[0], height=size[1], interpolation='AREA')


def _size(frame: Any, short_side: int, name: str) -> tuple[int, int]:
  if not 0 < min(frame.width, frame.height) <= max(frame.width, frame.height) <= _LONGEST_SIDE:
    raise VideoError(f'{name}: frames of {frame.width}x{frame.height} pixels')
  scale = short_side / min(frame.width, frame.height) if short_side else 1
  return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))


def write_video(
  path: str | Path, frames: Sequence[np.ndarray], rate: float, *, codec: str = 'mpeg4', pixels: str = 'yuv420p'
) -> None:
  """Writes frames (h, w, 3) of RGB bytes.

  Args:
    path: its ending says what kind of file it is.
    rate: frames in a second.
    codec: FFmpeg's name of one.
    pixels: FFmpeg's name of how it stores them; those with 420 lose the last row and column of odd sizes.
  """
  import av

  height, width = (s - s % 2 if '420' in pixels else s for s in frames[0].shape[:2])
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
    stream.width, stream.height, stream.pix_fmt = width, height, pixels
    stream.bit_rate = max(400_000, int(width * height * rate))
    for frame in frames:
      picture = np.ascontiguousarray(frame[:height, :width])
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    container.mux(stream.encode())


def to_jpeg(frame: UInt8[np.ndarray, 'h w 3'], quality: int = 90) -> bytes:
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(frame).save(file, 'JPEG', quality=quality)
  return file.getvalue()


def from_jpeg(encoded: bytes) -> UInt8[np.ndarray, 'h w 3']:
  from PIL import Image

  return np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))
