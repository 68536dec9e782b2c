"""Pictures of any kind that Pillow reads, as 8-bit RGB, shown as their file says."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from typing import Any

import numpy as np

from .limits import check_pixels

# What Pillow decodes from one file. Of an animation, or of a file of several pages, the first picture is taken.
ENDINGS = (
  '.apng', '.avif', '.bmp', '.dib', '.gif', '.j2k', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.jpx', '.pbm', '.pcx',
  '.pgm', '.png', '.pnm', '.ppm', '.sgi', '.tga', '.tif', '.tiff', '.webp',
)  # fmt: skip
# Whatever a file is called, no other decoder is tried: some run programs (EPS), or read other files.
FORMATS = ('AVIF', 'BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'PCX', 'PNG', 'PPM', 'SGI', 'TGA', 'TIFF', 'WEBP')
_LARGE = 16_000_000  # pixels, from which on one picture is decoded at a time: many threads would each take a gigabyte
_ALONE = threading.Lock()
_BITS, _PHOTOMETRIC, _SAMPLES, _WHITE_IS_ZERO = 258, 262, 277, 0  # of TIFF
BACKGROUND = 128  # under transparent pixels: a grey on which both black and white shapes are seen


def decode(picture: bytes | np.ndarray) -> Any:
  """Returns a Pillow image in RGB, from an encoded picture or from an array of bytes (h, w), (h, w, 1) or (h, w, 3).

  It is turned and mirrored as its EXIF orientation says. Grey of up to 16 bits is scaled to 8. Transparent pixels are
  laid over a mid grey, so that a shape that lives in the alpha channel alone is seen.

  Raises:
    OSError, ValueError: not a picture, one of too many pixels (`limits`), or one whose range is not known (floats, integers
      of 32 bits).
  """
  from PIL import Image

  if isinstance(picture, np.ndarray):
    return Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture).convert('RGB')
  image = opened(picture)
  check_pixels(*image.size)
  with _ALONE if image.size[0] * image.size[1] > _LARGE else contextlib.nullcontext():
    return _in_rgb(image, picture)


def opened(picture: bytes) -> Any:
  """Returns a Pillow image of which the header alone has been read.

  Raises:
    OSError, ValueError: it is no picture.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    return Image.open(io.BytesIO(picture), formats=_formats())
  except UnidentifiedImageError as error:
    raise ValueError('it is no picture') from error
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

  clear = picture[17] & 15 if image.format == 'TGA' else None  # bits of transparency, as a TGA's header has them
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
  """Makes the transparent value of a PNG one of 8 bits, as its pixels are by now.

  raw: how pixels are stored, in Pillow's words: 'L;2' is grey of 2 bits, 'RGB;16B' three times 16.
  """
  hidden = image.info.get('transparency')
  if isinstance(hidden, int) and raw in ('L;2', 'L;4'):
    image.info['transparency'] = hidden * 255 // (2 ** int(raw[-1]) - 1)
  if isinstance(hidden, tuple) and raw == 'RGB;16B':
    image.info['transparency'] = tuple(value >> 8 for value in hidden)


def _narrow(grey: np.ndarray, tags: Any, hidden: int | None) -> np.ndarray:
  """Grey of up to 16 bits as bytes.

  Args:
    grey: values.
    tags: of a TIFF, which says how many bits it has, and whether 0 is white.
    hidden: the value that is transparent, if one is.
  """
  bits = tags.get(_BITS, (16,))
  most = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
  found = (grey.astype(np.uint32) * 255 + most // 2) // most
  if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    found = 255 - found
  return np.where(grey == hidden, BACKGROUND, found).astype(np.uint8) if hidden is not None else found.astype(np.uint8)
