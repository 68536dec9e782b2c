"""Frames of video files, at a constant rate whatever the file's own, and files of frames."""

from __future__ import annotations

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


def read_video(
  source: str | Path | bytes, *, rate: float = 0.0, short_side: int = 0, longest: float = math.inf, name: str = ''
) -> Video:
  """All frames of a file, decoded by PyAV (FFmpeg).

  Frame k is the one that is shown k / rate seconds after the first: of variable rates too.

  Args:
    source: a path, or what is in the file.
    rate: frames in a second; 0: the file's own mean.
    short_side: pixels; frames are resized to it, their shape kept; 0: as they are.
    longest: seconds, from the start.
    name: for messages, where the source is no path.

  Raises:
    VideoError: no such file, not a video (empty, only sound), damaged, or shorter than it says.
  """
  name = name or (f'{len(source)} bytes' if isinstance(source, bytes) else str(source))
  rates: list[float] = []
  frames = list(frames_of(source, rate=rate, short_side=short_side, longest=longest, name=name, rates=rates))
  return Video(np.stack(frames), rates[0])


def frames_of(
  source: str | Path | bytes,
  *,
  rate: float = 0.0,
  short_side: int = 0,
  longest: float = math.inf,
  name: str = '',
  rates: list[float] | None = None,
) -> Iterator[UInt8[np.ndarray, 'h w 3']]:
  """The frames of `read_video`, one after the other, for files that do not fit in memory; `rates` is told the rate."""
  import av

  name = name or str(source)
  try:
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    with av.open(opened, metadata_errors='replace') as container:
      stream = next(iter(container.streams.video), None)
      if stream is None:
        raise VideoError(f'{name}: no video in it, only {_kinds(container)}')
      stream.thread_type = 'AUTO'
      own = float(stream.average_rate or stream.guessed_rate or 0)
      wanted = rate or own
      if not 0 < wanted < 1000:
        raise VideoError(f'{name}: its frame rate is not known; give one by rate=')
      if rates is not None:
        rates.append(wanted)
      yield from _at_rate(container, stream, wanted, own, short_side, longest, name)
  except VideoError:
    raise
  except (av.error.FFmpegError, OSError, ValueError, MemoryError, OverflowError) as error:
    words = (str(getattr(error, 'strerror', None) or error).splitlines() or [type(error).__name__])[0]
    raise VideoError(f'{name}: cannot be decoded: {words[:150]}') from error


def _at_rate(
  container: Any, stream: Any, rate: float, own: float, short_side: int, longest: float, name: str
) -> Iterator[np.ndarray]:
  """Shows each decoded frame until the next begins, and takes what is shown at k / rate."""
  shown, begins, first, k = None, 0.0, None, 0
  decoded = damaged = 0
  size = None
  for frame in container.decode(stream):
    # Files without time stamps run at their own mean rate.
    begins = frame.time if frame.time is not None else decoded / (own or rate)
    first = begins if first is None else first
    begins -= first
    decoded, damaged = decoded + 1, damaged + bool(frame.is_corrupt)
    while shown is not None and k / rate < begins - 1e-6 and k / rate < longest:
      yield shown
      k += 1
    if k / rate >= longest:
      break
    size = size or _size(frame, short_side, name)  # of the first: a stream may change its own
    shown = frame.to_ndarray(format='rgb24', width=size[0], height=size[1], interpolation='AREA')
  if shown is None:
    raise VideoError(f'{name}: not one frame can be decoded')
  if k / rate < longest:
    lasts = begins + 1 / (own or rate)
    while k == 0 or k / rate < min(lasts, longest) - 1e-6:
      yield shown
      k += 1
    # Matroska says it of the file alone, in microseconds.
    says = float(stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6)
    if min(says, longest) * _WHOLE > lasts + 1 / rate:
      raise VideoError(f'{name}: is cut off or damaged: {lasts:.1f} of its {says:.1f} seconds can be decoded')
  if damaged > (1 - _SOUND) * decoded:
    raise VideoError(f'{name}: is damaged: {damaged} of {decoded} frames')


def _size(frame: Any, short_side: int, name: str) -> tuple[int, int]:
  if not 0 < min(frame.width, frame.height) <= max(frame.width, frame.height) <= _LONGEST_SIDE:
    raise VideoError(f'{name}: frames of {frame.width}x{frame.height} pixels')
  scale = short_side / min(frame.width, frame.height) if short_side else 1
  return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))


def _kinds(container: Any) -> str:
  return ', '.join(sorted({stream.type for stream in container.streams})) or 'nothing'


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
