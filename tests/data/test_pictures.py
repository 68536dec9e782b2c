"""What becomes of a picture's pixels: depth, orientation, transparency."""

import io

import numpy as np
import pytest
from PIL import Image

from kronmesh.data.pictures import BACKGROUND, decode

RAMP = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)


def encoded(image, kind='PNG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_grey_of_16_bits_is_that_of_8(kind):
  wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
  found, expected = (np.asarray(decode(encoded(x, kind))) for x in (wide, Image.fromarray(RAMP)))
  np.testing.assert_array_equal(found, expected)
  assert found.shape == (32, 32, 3) and 127 < found.mean() < 128


def test_grey_of_16_bits_in_a_pgm():
  raw = b'P5 32 32 65535\n' + (RAMP.astype('>u2') * 257).tobytes()
  np.testing.assert_array_equal(np.asarray(decode(raw))[..., 0], RAMP)


@pytest.mark.parametrize(
  'image', [Image.new('F', (4, 4), 0.5), Image.new('I', (4, 4), 70000)], ids=['floats', '32 bits']
)
def test_pixels_of_unknown_range_are_refused(image):
  with pytest.raises(ValueError, match='have no known range; store 8 or 16 bits'):
    decode(encoded(image, 'TIFF'))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF'])
def test_orientation(orientation, kind):
  """Stored as the tag says it lies, a picture comes back upright."""
  upright = np.zeros((24, 32, 3), np.uint8)
  upright[:8], upright[:, :8] = (250, 0, 0), (0, 0, 250)  # red on top, blue on the left
  back = {2: [1], 3: [1, 0], 4: [0], 5: ['t'], 6: ['t', 0], 7: ['t', 0, 1], 8: ['t', 1]}.get(orientation, [])
  stored = upright
  for step in back:  # the inverse of what EXIF's table says
    stored = stored.transpose(1, 0, 2) if step == 't' else np.flip(stored, step)
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {'quality': 95, 'subsampling': 0} if kind == 'JPEG' else {}
  found = np.asarray(decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)))
  assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() < 40


@pytest.mark.parametrize('ink', [0, 255])
@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_a_shape_that_lives_in_the_alpha_channel_is_seen(ink, mode):
  shape = np.zeros((16, 16), np.uint8)
  shape[4:12, 4:12] = 255
  grey = Image.new('L', (16, 16), ink)
  image = Image.merge('LA', (grey, Image.fromarray(shape)))
  if mode == 'P':
    palette = Image.new('P', (16, 16))
    palette.putdata(((shape > 0) * 1).reshape(-1).tolist())
    palette.putpalette([9, 9, 9, ink, ink, ink])
    data = encoded(palette, transparency=0)
  else:
    data = encoded(image.convert(mode))
  found = np.asarray(decode(data))
  assert (found[4:12, 4:12] == ink).all() and (found[0] == BACKGROUND).all()


def test_half_transparent_pixels_are_mixed():
  found = np.asarray(decode(encoded(Image.new('RGBA', (4, 4), (255, 0, 0, 128)))))
  assert abs(int(found[0, 0, 0]) - (255 + BACKGROUND) / 2) < 2 and abs(int(found[0, 0, 1]) - BACKGROUND / 2) < 2


def test_arrays_of_bytes():
  assert decode(np.full((4, 5, 1), 7, np.uint8)).size == (5, 4)
  assert np.asarray(decode(np.full((4, 5, 3), 7, np.uint8))).shape == (4, 5, 3)


def test_the_first_of_an_animation():
  frames = [Image.new('RGB', (4, 4), (v, 0, 0)) for v in (200, 10)]
  found = decode(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]))
  assert np.asarray(found)[0, 0, 0] == 200
