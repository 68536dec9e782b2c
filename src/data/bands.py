"""Large frames as horizontal bands, each an encoded picture, so that reading some rows decodes only their bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from .pictures import opened
from .video import from_jpeg, to_jpeg

Frame = UInt8[np.ndarray, 'h w 3']
Rows = tuple[int, int]  # the first row, and the one after the last


class Crop(NamedTuple):
  """A part of every frame, and whether it is mirrored."""

  top: int
  left: int
  height: int
  width: int
  mirrored: bool = False


def to_bands(frame: Frame, bands: int) -> list[bytes]:
  """Encodes a frame as `bands` pictures, from the top down; the last may have fewer rows."""
  rows = -(-frame.shape[0] // bands)
  return [to_jpeg(frame[k * rows : (k + 1) * rows]) for k in range(bands)]


def size_of(encoded: Sequence[bytes]) -> tuple[int, int]:
  """Returns the height and width of a frame, from the headers of its bands."""
  sizes = [opened(band).size for band in encoded]
  return sum(h for _, h in sizes), sizes[0][0]


def rows_of(encoded: Sequence[bytes], rows: Rows) -> Frame:
  """Decodes these rows of a frame, using only the bands that hold some of them."""
  height, _ = size_of(encoded)
  each = size_of(encoded[:1])[0]
  low, high = max(rows[0], 0), min(rows[1], height)
  first, last = low // each, -(-high // each)
  there = np.concatenate([from_jpeg(band) for band in encoded[first:last]])
  return there[low - first * each : high - first * each]


def strip(encoded: Sequence[bytes], crop: Crop, size: tuple[int, int], rows: Rows) -> Frame:
  """Returns these rows of a crop of a frame, after the crop is resized to `size` (height, width).

  The result is made in as many pieces as the frame has bands, each resized from only the rows that it reads. So every
  host computes the same values for a row.
  """
  from PIL import Image

  height, width = size
  scale, each = crop.height / height, -(-height // len(encoded))
  reach = math.ceil(max(scale, 1.0)) + 1  # of the bilinear filter, in rows
  pieces, start = [], rows[0] // each * each
  for low in range(start, min(rows[1], height), each):
    high = min(low + each, height)
    first = max(0, math.floor(low * scale) - reach)
    last = min(crop.height, math.ceil(high * scale) + reach)
    part = rows_of(encoded, (crop.top + first, crop.top + last))[:, crop.left : crop.left + crop.width]
    box = (0, low * scale - first, crop.width, min(high * scale, crop.height) - first)
    pieces.append(np.asarray(Image.fromarray(part).resize((width, high - low), Image.Resampling.BILINEAR, box)))
  rows_of_strip = np.concatenate(pieces)[rows[0] - start : rows[1] - start]
  return rows_of_strip[:, ::-1] if crop.mirrored else rows_of_strip
