"""Pictures of any kind that Pillow reads, converted to 8-bit RGB and oriented as their file says."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from typing import Any

import numpy as np
from absl import logging

from .limits import check_pixels

# Pillow decodes each of these from one file, of which it takes the first picture if there are several.
ENDINGS = (
  '.apng', '.avif', '.bmp', '.dib', '.gif', '.j2k', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.jpx', '.pbm', '.pcx',
  '.pgm', '.png', '.pnm', '.ppm', '.sgi', '.tga', '.tif', '.tiff', '.webp',
)  # fmt: skip
# No other decoder is tried, whatever a file is called: some run programs (EPS), or read other files.
FORMATS = ('AVIF', 'BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'PCX', 'PNG', 'PPM', 'SGI', 'TGA', 'TIFF', 'WEBP')
_LARGE = 16_000_000  # pixels; larger pictures are decoded one at a time, as many threads would each take a gigabyte
_ALONE = threading.Lock()
_BITS, _PHOTOMETRIC, _SAMPLES, _WHITE_IS_ZERO = 258, 262, 277, 0  # of TIFF
BACKGROUND = 128  # the grey under transparent pixels, on which both black and white shapes show


def decode(picture: bytes | np.ndarray) -> Any:
  """Returns an RGB Pillow image, from an encoded picture or from an array of bytes (h, w), (h, w, 1) or (h, w, 3).

  The image is turned and mirrored as its EXIF orientation says. Grey of up to 16 bits is scaled to 8. Transparent
  pixels are laid over a mid grey, so that a shape that exists only in the alpha channel is seen.

  Raises:
    OSError, ValueError: it is not a picture, has too many pixels (`limits`), or has values of unknown range (floats,
      integers of 32 bits).
  """
  from PIL import Image

  if isinstance(picture, np.ndarray):
    return Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture).convert('RGB')
  image = opened(picture)
  check_pixels(*image.size)
  with _ALONE if image.size[0] * image.size[1] > _LARGE else contextlib.nullcontext():
    return _in_rgb(image, picture)


def opened(picture: bytes) -> Any:
  """Opens an encoded picture as a Pillow image, of which only the header is read.

  Raises:
    OSError, ValueError: it is not a picture.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    return Image.open(io.BytesIO(picture), formats=_formats())
  except UnidentifiedImageError as error:
    if picture.startswith(b'version https://git-lfs'):
      raise ValueError('it is a Git LFS pointer; run `git lfs pull` where the pictures come from') from error
    raise ValueError('it is not a picture') from error
  except Image.DecompressionBombError as error:
    raise ValueError(f'it has too many pixels: {error}') from error


@functools.cache
def _formats() -> list[str]:
  """Returns those of FORMATS that this Pillow was built with."""
  from PIL import Image

  Image.init()
  return [name for name in FORMATS if name in Image.OPEN]


def _in_rgb(image: Any, picture: bytes) -> Any:
  from PIL import Image, ImageOps

  clear = picture[17] & 15 if image.format == 'TGA' else None  # bits of transparency, from a TGA's header
  raw = image.tile[0][3] if image.format == 'PNG' and image.tile else ''
  wide = image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM'))
  tags = getattr(image, 'tag_v2', {})
  hidden = image.info.get('transparency') if wide else None
  image.load()
  ImageOps.exif_transpose(image, in_place=True)
  if wide:
    return Image.fromarray(_narrow(np.asarray(image), tags, hidden)).convert('RGB')
  bands = tags.get(_SAMPLES, 0)
  if bands > max(len(image.getbands()), 1):
    raise ValueError(
      f'it has {bands} bands, of which {len(image.getbands())} would be read; store those that are meant'
    )
  if image.mode == 'RGBA' and clear == 0:
    image = image.convert('RGB')
  if image.mode in ('F', 'I'):
    raise ValueError(f'pixels of mode {image.mode!r} have no known range; store 8 or 16 bits')
  _scale_transparency(image, raw)
  if not image.has_transparency_data:
    return image if image.mode == 'RGB' else image.convert('RGB')
  under = Image.new('RGBA', image.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
  return Image.alpha_composite(under, image.convert('RGBA')).convert('RGB')


def _scale_transparency(image: Any, raw: Any) -> None:
  """Scales the transparent value of a PNG to 8 bits, which its pixels already have.

  raw: how the file stores pixels, in Pillow's words: 'L;2' is grey of 2 bits, 'RGB;16B' is three times 16.
  """
  hidden = image.info.get('transparency')
  if isinstance(hidden, int) and raw in ('L;2', 'L;4'):
    image.info['transparency'] = hidden * 255 // (2 ** int(raw[-1]) - 1)
  if isinstance(hidden, tuple) and raw == 'RGB;16B':
    image.info['transparency'] = tuple(value >> 8 for value in hidden)


def _narrow(grey: np.ndarray, tags: Any, hidden: int | None) -> np.ndarray:
  """Converts grey of up to 16 bits to bytes.

  Args:
    grey: the values.
    tags: tags of a TIFF, which say how many bits it has and whether 0 is white.
    hidden: the value that is transparent, if there is one.
  """
  bits = tags.get(_BITS, (16,))
  most = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
  reached = int(grey.max(initial=0))
  if reached < most / 8:
    words = (
      'a grey picture reaches %d of %d and becomes almost black; multiply 12 bits that are stored in 16 by 16 first'
    )
    logging.log_first_n(logging.WARNING, words, 1, reached, most)
  grey8 = (grey.astype(np.uint32) * 255 + most // 2) // most
  if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    grey8 = 255 - grey8
  return np.where(grey == hidden, BACKGROUND, grey8).astype(np.uint8) if hidden is not None else grey8.astype(np.uint8)
