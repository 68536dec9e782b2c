"""Inputs that somebody brought: each is read as it is meant, or refused in one line that says what to change."""

import io
import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from kronmesh import data
from kronmesh.data.pictures import BACKGROUND, decode

LABELS = np.arange(4) % 2


def stored(path, **arrays):
  np.savez(path, **arrays)
  return path.read_bytes()


def saved(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def fits(tmp_path, **arrays):
  (tmp_path / 'train.npz').write_bytes(stored(tmp_path / 'made.npz', **arrays))
  return data.load_arrays('arrays', 'train', source=str(tmp_path))


def broken(tmp_path, how):
  whole = stored(tmp_path / 'made.npz', image=np.ones((4, 2, 2, 1)), label=LABELS)
  flipped = bytearray(whole)
  flipped[whole.find(b'NUMPY')] ^= 255
  return {
    'one array': saved(np.ones((4, 2))), 'empty': b'', 'cut off': whole[: len(whole) // 2], 'text': b'hello\n',
    'damaged': bytes(flipped), 'nothing': None,
  }[how]  # fmt: skip


@pytest.mark.parametrize('how,words', [
  ('one array', 'holds one array, as np.save writes it; write it by np.savez'), ('empty', 'is not a file of np.savez'),
  ('cut off', 'is not a file of np.savez'), ('text', 'is not a file of np.savez'), ('damaged', 'is not a file of np.savez'),
  ('nothing', 'cannot be read: No such file'),
])  # fmt: skip
def test_files_that_are_no_arrays(tmp_path, how, words):
  raw = broken(tmp_path, how)
  if raw is not None:
    (tmp_path / 'train.npz').write_bytes(raw)
  with pytest.raises(data.DataError, match=rf'train\.npz {words}') as caught:
    data.load_arrays('arrays', 'train', source=str(tmp_path))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('arrays,words', [
  ({'images': np.ones((4, 2)), 'labels': LABELS}, "has the arrays 'images', 'labels', and not 'image', 'label'"),
  ({'image': np.array([{}] * 4), 'label': LABELS}, 'it has arrays of objects'),
  ({'image': np.float32(1), 'label': LABELS}, r'has images of shape \(\) and labels of shape \(4,\)'),
  ({'image': np.ones(4), 'label': LABELS}, r'has images of shape \(4,\)'),
  ({'image': np.ones((4, 0, 8)), 'label': LABELS}, r'none with a pixel: their shape is \(4, 0, 8\)'),
  ({'image': np.full((4, 2), 1e300), 'label': LABELS}, 'image 0 has values that are not finite, or too large for float32'),
  ({'image': np.ones((4, 2)), 'label': np.array([0, 1, 2**63, 0], np.uint64)}, 'has the label 9223372036854775808'),
  ({'image': np.ones((4, 2)), 'label': np.array([0, 1, 5_000_000_000, 0])}, 'has the label 5000000000'),
  ({'image': np.ones((4, 2)), 'label': np.array([0, 1, np.inf, 0])}, 'has the label inf'),
])  # fmt: skip
def test_arrays_that_are_refused(tmp_path, arrays, words):
  with pytest.raises(data.DataError, match=words):
    fits(tmp_path, **arrays)


@pytest.mark.parametrize('kind', ['>u2', '<u2', '>f4', 'f2', '>f8', '?'])
def test_arrays_in_any_order_of_bytes(tmp_path, kind):
  bright = np.tile(np.array([0, 1], np.float64), (4, 3))
  most = np.iinfo(kind).max if 'u' in kind else 1
  found = fits(tmp_path, image=np.asfortranarray((bright * most).astype(kind)), label=LABELS.astype('>i8'))
  np.testing.assert_allclose(found.inputs, bright)
  np.testing.assert_array_equal(found.label, LABELS)


RAMP = np.arange(256, dtype=np.uint16).repeat(4).reshape(32, 32)


def tiff(values, bits, white_is_zero=False):
  """An uncompressed grey TIFF of any depth up to 16 bits, as scanners write it."""
  if bits == 16:
    pixels = values.astype('<u2').tobytes()
  else:
    rows = [''.join(f'{int(v):0{bits}b}' for v in row) for row in values]
    pixels = b''.join(int(r.ljust(-(-len(r) // 8) * 8, '0'), 2).to_bytes(-(-len(r) // 8), 'big') for r in rows)
  height, width = values.shape
  entries = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
             (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(pixels))]  # fmt: skip
  head = b'II*\0' + (8 + len(pixels)).to_bytes(4, 'little')
  table = b''.join(
    tag.to_bytes(2, 'little') + kind.to_bytes(2, 'little') + (1).to_bytes(4, 'little') + value.to_bytes(4, 'little')
    for tag, kind, value in entries
  )
  return head + pixels + len(entries).to_bytes(2, 'little') + table + b'\0' * 4


@pytest.mark.parametrize('bits,scale,white_is_zero', [(12, 4095 / 255, False), (16, 257, False), (16, 257, True)])
def test_grey_of_scanners(bits, scale, white_is_zero):
  values = np.round(RAMP * scale).astype(np.uint16)
  values = 2**bits - 1 - values if white_is_zero else values
  found = np.asarray(decode(tiff(values, bits, white_is_zero)))[..., 0]
  assert np.abs(found.astype(int) - RAMP).max() <= (1 if bits == 12 else 0)


def test_one_grey_of_16_bits_that_is_transparent():
  import struct
  import zlib

  grey = np.full((8, 8), 40000, np.uint16)
  grey[2:6, 2:6] = 1000
  chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))  # noqa: E731
  raw = b''.join(b'\0' + row.astype('>u2').tobytes() for row in grey)
  png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 0, 0, 0, 0))
  png += chunk(b'tRNS', struct.pack('>H', 1000)) + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b'')
  found = np.asarray(decode(png))[..., 0]
  assert (found[3, 3], found[0, 0]) == (BACKGROUND, round(40000 / 257))


@pytest.mark.parametrize(
  'mode,kind', [('CMYK', 'JPEG'), ('1', 'PNG'), ('LAB', 'TIFF'), ('YCbCr', 'JPEG'), ('P', 'GIF')]
)
def test_pictures_in_other_colours(mode, kind):
  file = io.BytesIO()
  Image.new('RGB', (8, 8), (250, 250, 250)).convert(mode if mode != 'LAB' else 'RGB').save(file, kind)
  assert np.asarray(decode(file.getvalue())).mean() > 240


def picture(path, value=10, raw=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  if raw is None:
    Image.new('RGB', (8, 8), (value,) * 3).save(path)
  else:
    path.write_bytes(raw)


def test_a_picture_that_cannot_be_read_is_named(tmp_path, caplog):
  for i in range(12):
    picture(tmp_path / f'train/a/{i:02}.png', raw=b'<html>' if i == 3 else None)
  source = data.record_source('image_folder', 'train', folder=str(tmp_path))
  list(data.record_batches(source, 12, seed=0, size=8, train=False))
  (words,) = [r.message for r in caplog.records if 'cannot be read' in r.message]
  assert 'train/a/03.png) cannot be read: it is not a picture; the next one takes its place' in words


def test_a_class_of_which_no_picture_can_be_read(tmp_path):
  """A fifth of a small set is too much, though they are fewer than ten."""
  for i in range(8):
    picture(tmp_path / f'train/a/{i}.png')
    picture(tmp_path / f'train/b/{i}.png', raw=b'<html>')
  source = data.record_source('image_folder', 'train', folder=str(tmp_path))
  with pytest.raises(data.DataError, match='cannot be read: it is not a picture, and 3 others; mend the data set'):
    list(data.stream(data.record_batches(source, 16, seed=0, size=8, train=False)))


def film(path, stamps, rate=1000, codec='libx264', sound=0.0, size=(64, 48), **options):
  """A film whose frames are shown at these milliseconds; the last one until the stamp at the end."""
  with av.open(str(path), 'w', **options) as container:
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
    stream.codec_context.time_base = Fraction(1, 1000)
    voice = container.add_stream('aac', rate=44100, layout='mono') if sound else None
    for k, (stamp, end) in enumerate(itertools.pairwise(stamps)):
      frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 20 * k % 250, np.uint8), format='rgb24')
      frame.pts, frame.time_base, frame.duration = stamp, Fraction(1, 1000), end - stamp
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    for i in range(int(sound * 44100 / 1024)):
      block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
      block.rate, block.pts = 44100, i * 1024
      container.mux(voice.encode(block))
    container.mux(voice.encode() if voice else [])
  return path


@pytest.mark.parametrize('name', ['slides.mkv', 'slides.webm', 'slides.mp4'])
def test_slides_of_five_seconds(tmp_path, name):
  path = film(tmp_path / name, [0, 5000, 10000, 15000], codec='libvpx' if name.endswith('webm') else 'libx264')
  frames = data.read_video(path, rate=1).frames
  assert len(frames) >= 11 and len(np.unique(frames.mean((1, 2, 3)).round(-1))) == 3


def test_an_animation_that_holds_its_last_picture(tmp_path):
  pictures = [Image.new('L', (32, 32), 50 * k) for k in range(5)]
  pictures[0].save(tmp_path / 'a.gif', save_all=True, append_images=pictures[1:], duration=[100, 100, 100, 100, 3000])
  assert len(data.read_video(tmp_path / 'a.gif', rate=10).frames) >= 30


def test_a_film_whose_sound_is_longer(tmp_path):
  path = film(tmp_path / 'a.mkv', [100 * k for k in range(11)], sound=3.0)
  assert len(data.read_video(path, rate=10).frames) == 10


def test_names_that_look_like_protocols(tmp_path, monkeypatch):
  film(tmp_path / '12:30.mp4', [100 * k for k in range(11)])
  monkeypatch.chdir(tmp_path)
  assert len(data.read_video('12:30.mp4', rate=10).frames) == 10


def test_a_transparent_animation_lies_over_grey(tmp_path):
  white = np.zeros((32, 32, 4), np.uint8)
  white[8:24, 8:24] = 255
  pictures = [Image.fromarray(white)] * 3
  pictures[0].save(tmp_path / 'a.gif', save_all=True, append_images=pictures[1:], duration=100, disposal=2)
  frame = data.read_video(tmp_path / 'a.gif', rate=10).frames[0]
  assert abs(int(frame[0, 0, 0]) - BACKGROUND) < 3 and frame[16, 16, 0] > 240


@pytest.mark.parametrize(
  'rate,words', [(-1.0, '-1 frames in a second'), (5000.0, '5000 frames'), (float('nan'), 'nan frames')]
)
def test_rates_that_are_none(tmp_path, rate, words):
  path = film(tmp_path / 'a.mp4', [0, 100, 200])
  with pytest.raises(data.VideoError, match=f'{words}.* are not between 0 and 1000; give another by rate='):
    data.read_video(path, rate=rate)


def test_films_that_are_no_films(tmp_path):
  film(tmp_path / 'a.mp4', [0, 100, 200])
  (tmp_path / 'list.mp4').write_text("ffconcat version 1.0\nfile 'a.mp4'\n")
  with pytest.raises(data.VideoError, match='of no kind of film that is read'):
    data.read_video(tmp_path / 'list.mp4')
  path = film(tmp_path / 'flat.mp4', [0, 100, 200], size=(2000, 2))
  with pytest.raises(data.VideoError, match='would be scaled to 64000x64'):
    data.read_video(path, rate=10, short_side=64)


@pytest.mark.parametrize('text,words', [
  ('a,b\n"1,2\n3,4\n', 'is not a CSV file: unexpected end of data'), ('a,b\n1\n', 'row 1 has fewer fields'),
  ('a,a\n1,2\n', 'has a column twice: a, a'), ('', 'is empty'),
  (f'a,b\n{"x" * 200_000},1\n', 'field larger than field limit'),
])  # fmt: skip
def test_tables_that_are_none(tmp_path, text, words):
  (tmp_path / 'a.csv').write_text(text)
  with pytest.raises(data.DataError, match=rf'a\.csv: .*{words}|a\.csv: {words}'):
    data.read_table(tmp_path / 'a.csv')


def test_a_table_with_lines_inside_of_quotes(tmp_path):
  (tmp_path / 'a.csv').write_text('a, b\n"1\n2",3\n')
  assert data.read_table(tmp_path / 'a.csv') == [{'a': '1\n2', 'b': '3'}]


def test_encodings_of_triples(tmp_path):
  (tmp_path / 'a.nt').write_bytes('<http://x/a> <http://x/r> "caf\u00e9" .\n'.encode('cp1252'))
  with pytest.raises(data.DataError, match=r'a\.nt, line 1: byte 0xe9 is not UTF-8'):
    data.read_triples(tmp_path / 'a.nt')
  (tmp_path / 'a.txt').write_bytes('a\tr\tb\n'.encode('utf-16-le'))
  with pytest.raises(data.DataError, match=r'a\.txt: has zero bytes, as UTF-16 has'):
    data.read_triples(tmp_path / 'a.txt')
