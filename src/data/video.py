"""Frames of video files, read at a constant rate whatever the file's rate, and video files written from frames."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ..extras import load
from .errors import DataError
from .folders import shown
from .limits import check_pixels, check_regular
from .pictures import BACKGROUND, opened

_WHOLE = 0.8  # a file that states its length must decode to at least this share of it
_SOUND = 0.9  # this share of its frames must be without known damage
_LONGEST_SIDE = 16384
_SHAPE = 0.05  # the shape of frames may change by this share within a film
_STILL = 3600.0, 100_000  # a film may stand still for this many seconds and this many repeated frames in all
_DISCONTINUOUS = ('mpegts', 'mpeg', 'hls', 'rtsp')  # formats whose time stamps may leap, according to FFmpeg
_LEAP = 10.0  # seconds
_JITTER = 3.0  # stamps may go back by this many frames before the film counts as starting again
# Formats that FFmpeg may recognise, whatever a file is called. Others read further files (lists, HLS), or devices.
_FORMATS = (
  '3dostr', 'apng', 'asf', 'avi', 'dv', 'flv', 'gif', 'h264', 'hevc', 'ivf', 'kux', 'live_flv', 'm4v', 'matroska', 'webm',
  'mjpeg', 'mov', 'mp4', 'm4a', '3gp', '3g2', 'mj2', 'mpeg', 'mpegts', 'mpegvideo', 'mxf', 'nut', 'obu', 'ogg', 'rm',
  'yuv4mpegpipe', 'aac', 'flac', 'mp3', 'wav',
)  # fmt: skip
# Decoders that keep transparency.
_CLEAR = {'vp8': 'libvpx', 'vp9': 'libvpx-vp9'}
# Endings of films that FFmpeg decodes.
ENDINGS = (
  '.3g2', '.3gp', '.asf', '.avi', '.divx', '.dv', '.f4v', '.flv', '.gif', '.h264', '.h265', '.hevc', '.ivf', '.m2ts',
  '.m2v', '.m4v', '.mjpeg', '.mjpg', '.mkv', '.mov', '.mp4', '.mpe', '.mpeg', '.mpg', '.mts', '.mxf', '.nut', '.ogg',
  '.ogv', '.qt', '.rm', '.rmvb', '.ts', '.vob', '.webm', '.wmv', '.y4m',
)  # fmt: skip


class VideoError(DataError):
  """Reports a file that is not a video or cannot be decoded; one line names it."""


class Video(NamedTuple):
  """Holds the frames of a video.

  Attributes:
    frames: (time, height, width, 3), RGB.
    rate: frames in a second.
  """

  frames: UInt8[np.ndarray, 't h w 3']
  rate: float


class Film(NamedTuple):
  """An opened video file. rate: its mean frames in a second; 0 if that is not known."""

  container: Any
  stream: Any
  rate: float
  name: str

  def frames(
    self, *, rate: float = 0.0, short_side: int = 0, longest: float = math.inf
  ) -> Iterator[UInt8[np.ndarray, 'h w 3']]:
    """Yields the frames of `read_video` one after another; at most one waits in memory."""
    if not rate and not self.rate:
      raise VideoError(f'{self.name}: its frame rate is not known; give one by rate=')
    rate = rate or self.rate
    if not 0 < rate <= 1000:
      raise VideoError(f'{self.name}: {rate:g} frames in a second are not between 0 and 1000; give another by rate=')
    first, frame, picture, begins, k, decoded, damaged = None, None, None, 0.0, 0, 0, 0
    still = _Still(self, rate)
    size, clock = None, Clock(self, self.rate or rate)
    stretch = float(self.stream.sample_aspect_ratio or 1)
    for after in self._decoded():
      begins = clock.of(after)
      size = size or _size(after, stretch, short_side, self.name)  # that of the first frame, as a stream may change it
      first = first or after
      if abs(after.width * first.height - first.width * after.height) > _SHAPE * first.width * after.height:
        sizes = f'{first.width}x{first.height} to {after.width}x{after.height}'
        raise VideoError(f'{self.name}: its frames change from {sizes} after {begins:.1f} s; cut it there')
      decoded, damaged = decoded + 1, damaged + bool(after.is_corrupt)
      still.count(min(begins, longest) - k / rate)
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
      lasts = begins + max(clock.each, float((frame.duration or 0) * (frame.time_base or 0)))
      picture = _pixels(frame, size) if picture is None else picture
      still.count(min(lasts, longest) - k / rate)
      while k == 0 or k / rate < min(lasts, longest) - 1e-6:
        yield picture
        k += 1
      says = clock.stated()
      if min(says, longest) * _WHOLE > lasts + clock.leapt + max(clock.longest, 1 / rate):
        raise VideoError(f'{self.name}: is cut off or damaged: {lasts:.1f} of its {says:.1f} seconds can be decoded')
    if damaged > (1 - _SOUND) * decoded:
      raise VideoError(f'{self.name}: is damaged: {damaged} of {decoded} frames')

  def _decoded(self) -> Iterator[Any]:
    """Yields all frames as they are stored.

    FFmpeg's own decoders of VP8 and VP9 drop transparency, so streams that have it get another decoder.
    """
    av = load('video', 'av')

    decoder = _CLEAR.get(self.stream.codec_context.name)
    if decoder is None or self.stream.metadata.get('alpha_mode') != '1':
      yield from self.container.decode(self.stream)
      return
    clear = av.CodecContext.create(decoder, 'r')
    for packet in self.container.demux(self.stream):
      yield from clear.decode(packet if packet.size else None)


class _Still:
  """A count of how long a film stands still: a frame may claim to be shown for a thousand years."""

  def __init__(self, film: Film, rate: float):
    self.film, self.rate, self.seconds = film, rate, 0.0

  def count(self, seconds: float) -> None:
    """Adds how long a frame is shown, beyond one second; raises VideoError if the total is too long."""
    self.seconds += max(0.0, seconds - 1.0)
    most, repeated = _STILL
    if self.seconds > most or self.seconds * self.rate > repeated:
      allowed = min(most, repeated / self.rate)
      raise VideoError(
        f'{self.film.name}: its frames stand still for {self.seconds:,.0f} seconds, and {allowed:,.0f} are allowed; '
        'its time stamps are damaged'
      )


class Clock:
  """The times at which the frames of a film are shown, in seconds after its first frame.

  Files may begin at any time stamp. If stamps start again (films that were joined), or if those of a broadcast leap by
  more than ten seconds, the frame follows directly on the one before it.

  each: how long a frame lasts. longest: the longest time that one was shown. leapt: the seconds that were leapt over.
  """

  def __init__(self, film: Film, rate: float):
    self.film, self.each, self.count = film, 1 / rate, 0
    self.first: float | None = None  # the stamp that counts as 0
    self.start, self.last, self.longest, self.leapt = 0.0, 0.0, 0.0, 0.0
    self.leaps = film.container.format.name in _DISCONTINUOUS

  def of(self, frame: Any) -> float:
    """Returns when the next frame is shown."""
    stamp = frame.time
    if stamp is None:  # files without time stamps run at their mean rate
      stamp = (self.first or 0.0) + self.count * self.each
    if self.first is None:
      self.first = self.start = stamp
    shown = stamp - self.first
    if self.count and (shown < self.last - _JITTER * self.each or (self.leaps and shown > self.last + _LEAP)):
      self.leapt += max(0.0, shown - self.last - self.each)
      shown = self.last + self.each
      self.first = stamp - shown
    self.longest = max(self.longest, shown - self.last)
    self.count, self.last = self.count + 1, max(shown, self.last)
    return self.last

  def stated(self) -> float:
    """Returns the length that the film states, in seconds; 0 if it states none."""
    stream, container = self.film.stream, self.film.container
    if stream.duration:
      return float(stream.duration * stream.time_base)
    # Matroska counts the length from stamp 0, for the file and in a tag of the stream. Sound may make the file longer.
    from_zero = max(self.start, 0.0) if 'matroska' in container.format.name else 0.0
    tag = re.fullmatch(r'(\d+):(\d+):(\d+\.?\d*)', stream.metadata.get('DURATION', ''))
    if tag:
      says = 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    else:
      says = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
    return max(0.0, says - from_zero)


@contextlib.contextmanager
def open_video(source: str | Path | bytes, name: str = '') -> Iterator[Film]:
  """Opens a file with PyAV (FFmpeg) and turns errors while it is read into one line.

  Args:
    source: a path, or the content of the file.
    name: name for messages, if the source is not a path.

  Raises:
    VideoError: the file does not exist, is not a video (empty, only sound), or is damaged.
  """
  av = load('video', 'av')

  name = name or (f'{len(source)} bytes' if isinstance(source, bytes) else shown(source))
  try:
    # The path is absolute, because FFmpeg takes whatever comes before a colon for a protocol.
    source_file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    if not isinstance(source, bytes):
      check_regular(source)
    with av.open(source_file, metadata_errors='replace', options={'format_whitelist': ','.join(_FORMATS)}) as container:
      stream = _film_of(container)
      if stream is None:
        kinds = ', '.join(sorted({s.type for s in container.streams})) or 'nothing'
        raise VideoError(f'{name}: no video in it, only {kinds}')
      check_pixels(stream.width or 0, stream.height or 0)
      stream.thread_type = 'AUTO'
      yield Film(container, stream, float(stream.average_rate or stream.guessed_rate or 0), name)
  except VideoError:
    raise
  except DataError as error:
    raise VideoError(str(error)) from error
  except (av.error.FFmpegError, OSError, ValueError, MemoryError, OverflowError) as error:
    words = (str(getattr(error, 'strerror', None) or error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, av.error.ArgumentError):
      words = 'it is of no kind of film that is read'
    raise VideoError(f'{name}: cannot be decoded: {words[:150]}') from error


def read_video(
  source: str | Path | bytes, *, rate: float = 0.0, short_side: int = 0, longest: float = math.inf, name: str = ''
) -> Video:
  """Reads all frames of a file at a constant rate.

  Frame k is the one that is shown k / rate seconds after the first, also in files of variable rate.

  Args:
    source: a path, or the content of the file.
    rate: frames in a second; 0 for the file's mean rate.
    short_side: pixels to which the shorter side is resized, with the shape kept; 0 keeps the size.
    longest: seconds to read, from the start.
    name: name for messages, if the source is not a path.

  Returns:
    A `Video`: the frames, turned as the file says, and their rate.

  Raises:
    VideoError: the file does not exist, is not a video (empty, only sound), is damaged, or is shorter than it says.
  """
  with open_video(source, name) as film:
    frames = list(film.frames(rate=rate, short_side=short_side, longest=longest))
    return Video(np.stack(frames), rate or film.rate)


def _film_of(container: Any) -> Any:
  """Returns the stream that is the film, not a picture beside it (a cover, a thumbnail).

  Of several films it takes the one that FFmpeg calls best.
  """
  films = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic and s.frames != 1]
  best = container.streams.best('video')
  return best if best in films else max(films or container.streams.video, key=_area, default=None)


def _area(stream: Any) -> int:
  return (stream.width or 0) * (stream.height or 0)


def _pixels(frame: Any, size: tuple[int, int]) -> UInt8[np.ndarray, 'h w 3']:
  """Returns a frame as it is shown, at this width and height."""
  way = _way(frame)
  width, height = size[::-1] if way.turned else size
  clear = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
  picture = frame.to_ndarray(format='rgba' if clear else 'rgb24', width=width, height=height, interpolation='AREA')
  if clear:
    alpha = picture[..., 3:].astype(np.float32) / 255
    picture = (picture[..., :3] * alpha + BACKGROUND * (1 - alpha)).round().astype(np.uint8)
  picture = picture.transpose(1, 0, 2) if way.turned else picture
  return np.ascontiguousarray(picture[:: way.down, :: way.right])


class _Way(NamedTuple):
  """The change from a stored frame to the shown one.

  Rows and columns are exchanged if `turned`, then both axes are read in steps of `down` and `right`.
  """

  turned: bool = False
  down: int = 1
  right: int = 1


def _way(frame: Any) -> _Way:
  """Reads the display matrix beside the stream, to the nearest quarter of a turn; it may also mirror."""
  Type = load('video', 'av.sidedata.sidedata').Type

  matrix = frame.side_data.get(Type.DISPLAYMATRIX)
  if matrix is None:
    return _Way()
  (a, b, _), (c, d, _) = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2].tolist()
  sign = lambda x: -1 if x < 0 else 1  # noqa: E731
  # A stored pixel at column x and row y is shown at column a x + c y and row b x + d y.
  return _Way(False, sign(d), sign(a)) if abs(a) >= abs(b) else _Way(True, sign(b), sign(c))


def _size(frame: Any, stretch: float, short_side: int, name: str) -> tuple[int, int]:
  """Returns a frame's width and height as shown. stretch: the width of a stored pixel over its height."""
  if not 0 < min(frame.width, frame.height) <= max(frame.width, frame.height) <= _LONGEST_SIDE:
    raise VideoError(f'{name}: frames of {frame.width}x{frame.height} pixels')
  width, height = (frame.width * stretch, frame.height) if 0.1 < stretch < 10 else (frame.width, frame.height)
  scale = short_side / min(width, height) if short_side else 1
  width, height = max(1, round(width * scale)), max(1, round(height * scale))
  if max(width, height) > _LONGEST_SIDE:
    raise VideoError(f'{name}: frames of {frame.width}x{frame.height} would be scaled to {width}x{height}')
  return (height, width) if _way(frame).turned else (width, height)


def write_video(
  path: str | Path,
  frames: Sequence[UInt8[np.ndarray, 'h w 3']],
  rate: float,
  *,
  codec: str = 'mpeg4',
  pixels: str = 'yuv420p',
) -> None:
  """Writes frames of RGB bytes to a video file.

  Args:
    path: the file; its ending says what kind of file it is.
    frames: the frames, (h, w, 3) each, of the size of the first.
    rate: frames in a second.
    codec: FFmpeg's name of the codec.
    pixels: FFmpeg's name of the pixel format; formats with 420 lose the last row and column of odd sizes.
  """
  av = load('video', 'av')

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
  return np.asarray(opened(encoded).convert('RGB'))
