"""More inputs that somebody brought: what was silent is told or refused, and what was a traceback is one line."""

import gzip
import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kronmesh import data
from kronmesh.data.layouts import look
from kronmesh.data.pictures import BACKGROUND, decode
from kronmesh.data.triples import load_triples
from tests.data.films import film, uneven_film


@pytest.fixture
def warned(caplog):
  """What was logged, as one text."""
  logging.getLogger('absl').setLevel(logging.WARNING)
  return lambda: ' '.join(record.getMessage() for record in caplog.records)


# Graphs


def graph(folder, ending, train, valid, test):
  for name, text in (('train', train), ('valid', valid), ('test', test)):
    (folder / f'{name}.{ending}').write_text(text, encoding='utf-8')
  return str(folder)


ONE = '<http://x/a> <http://x/r> <http://x/b> .\n'
TWO = '<http://x/b> <http://x/r> <http://x/a> .\n'


def test_blank_nodes_have_the_same_names_in_every_process(tmp_path):
  blank = ''.join(f'<http://x/a> <http://x/r> _:n{i} .\n_:n{i} <http://x/r> <http://x/b> .\n' for i in range(8))
  source = graph(tmp_path, 'nt', blank, ONE, TWO)
  first, again = (load_triples('triples', source=source) for _ in range(2))
  assert first.entities == again.entities and '_:n3' in first.entities
  np.testing.assert_array_equal(first.splits['train'], again.splits['train'])


def test_a_blank_node_that_is_asked_about_is_refused_by_its_name(tmp_path):
  source = graph(tmp_path, 'nt', '_:n0 <http://x/r> _:n1 .\n' + ONE, '_:n0 <http://x/r> _:n1 .\n', TWO)
  with pytest.raises(data.DataError, match=r'_:n0 of valid is a blank node, another one than that of train'):
    load_triples('triples', source=source)


def test_literals_are_known_by_their_type_and_language(tmp_path):
  literals = '"1"', '"1"^^<http://www.w3.org/2001/XMLSchema#integer>', '"Paris"@fr', '"Paris"@en', '"http://x/b"'
  train = ONE + ''.join(f'<http://x/a> <http://x/r> {literal} .\n' for literal in literals)
  found = load_triples('triples', source=graph(tmp_path, 'nt', train, TWO, ''))
  assert len(found.entities) == 2 + len(literals)


@pytest.mark.parametrize('head', ['head\trelation\ttail', 'Subject\tPredicate\tObject', 'source\tlabel\ttarget'])
def test_a_header_is_no_triple(tmp_path, head):
  source = graph(tmp_path, 'tsv', f'{head}\na\tr\tb\n', 'b\tr\ta\n', 'a\tr\ta\n')
  with pytest.raises(data.DataError, match=r'train.tsv, line 1: .+ is a header, no triple; remove it'):
    load_triples('triples', source=source)


def test_names_that_look_the_same_are_told(tmp_path, warned):
  load_triples(
    'triples', source=graph(tmp_path, 'tsv', 'a\tr\tcafe\u0301\nb\tr\tcaf\u00e9\n', 'a\tr\tb\n', 'b\tr\ta\n')
  )
  assert 'look the same and are two names' in warned()


# Films


def test_a_film_that_stands_still_for_days_is_refused(tmp_path):
  times = [k / 10 for k in range(20)]
  uneven_film(tmp_path / 'leaps.mkv', [*times, *(10**5 + t for t in times)], 'libx264')
  with pytest.raises(data.VideoError, match=r'its frames stand still for [\d,]+ seconds, and 3,600 are allowed'):
    data.read_video(tmp_path / 'leaps.mkv', rate=5)
  uneven_film(tmp_path / 'slides.mkv', [60.0 * k for k in range(10)], 'libx264')
  assert len(data.read_video(tmp_path / 'slides.mkv', rate=1).frames) > 540


def crime(folder, name, note):
  for path in ('Abuse/Abuse001_x264.mp4', 'Normal_Videos/N1.mp4', f'Abuse/{name}', 'Normal_Videos/N2.mp4'):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    film(folder / path)
  (folder / 'Anomaly_Train.txt').write_text('Abuse\\Abuse001_x264.mp4\nNormal_Videos/N1.mp4\n')
  (folder / 'Anomaly_Test.txt').write_text(f'Abuse/{name}\nNormal_Videos/N2.mp4\n')
  (folder / 'Temporal_Anomaly_Annotation.txt').write_text(note)
  return folder


def test_an_annotation_of_a_name_with_a_space(tmp_path):
  note = 'Abuse 028.mp4  Abuse  165  240  -1  -1\n'
  entries = look('ucf_crime', crime(tmp_path, 'Abuse 028.mp4', note)).entries
  assert {e.path.name: e.spans for e in entries if e.label == 'Abuse'} == {
    'Abuse001_x264.mp4': (),
    'Abuse 028.mp4': ((165.0, 240.0),),
  }


@pytest.mark.parametrize('note, words', [
  ('Abuse028.mp4  Abuse  165  240  -1\n', r'Annotation.txt, line 1: .+ is not a name, a class and pairs of frames'),
  ('Abuse028  Abuse  165  240  -1  -1\n', r"no film of the lists is called like one of the annotation, such as 'Abuse028'"),
])  # fmt: skip
def test_annotations_that_fit_no_film(tmp_path, note, words):
  with pytest.raises(data.DataError, match=words):
    look('ucf_crime', crime(tmp_path, 'Abuse028.mp4', note))


def test_two_files_of_one_clip_of_kinetics_are_counted(tmp_path):
  head = 'label, youtube_id, time_start, time_end, split\n'
  for split, name in (('train', 'aaaaaaaaaaa'), ('val', 'bbbbbbbbbbb')):
    (tmp_path / split).mkdir()
    film(tmp_path / split / f'{name}_000001_000003.mp4')
    (tmp_path / f'{split}.csv').write_text(head + f'x, {name}, 1, 3, {split}\n')
  film(tmp_path / 'train/aaaaaaaaaaa_1_3.mp4')
  found = look('kinetics', tmp_path)
  assert len(found.entries) == 2
  assert [(p.name, why) for p, why in found.left_out] == [('aaaaaaaaaaa_1_3.mp4', 'another file of the same clip')]


# Pictures and tables


def png(kind, depth, row, transparent):
  """A PNG of one pixel, by hand."""
  chunk = lambda name, raw: struct.pack('>I', len(raw)) + name + raw + struct.pack('>I', zlib.crc32(name + raw))  # noqa: E731
  head = chunk(b'IHDR', struct.pack('>IIBBBBB', 1, 1, depth, kind, 0, 0, 0))
  rest = chunk(b'tRNS', transparent) + chunk(b'IDAT', zlib.compress(b'\0' + row)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + head + rest


@pytest.mark.parametrize('picture', [
  png(0, 2, b'\xc0', b'\0\3'), png(0, 4, b'\xf0', b'\0\x0f'), png(0, 8, b'\x07', b'\0\x07'),
  png(2, 16, b'\x12\x34\x56\x78\x9a\xbc', b'\x12\x34\x56\x78\x9a\xbc'), png(2, 8, b'\1\2\3', b'\0\1\0\2\0\3'),
], ids=['grey of 2 bits', 'grey of 4', 'grey of 8', 'colours of 16', 'colours of 8'])  # fmt: skip
def test_a_value_that_is_transparent(picture):
  assert np.asarray(decode(picture)).reshape(-1).tolist() == [BACKGROUND] * 3


def test_a_packed_text_is_called_packed(tmp_path):
  (tmp_path / 'run.txt').write_bytes(gzip.compress(b'a b c'))
  with pytest.raises(data.DataError, match=r'run.txt: is packed by gzip; unpack it'):
    data.read_lines(tmp_path / 'run.txt')


def idx(folder, images, labels):
  folder.mkdir(exist_ok=True)
  pairs = ('train-images-idx3-ubyte', images), ('train-labels-idx1-ubyte', labels)
  others = (
    ('t10k-images-idx3-ubyte', np.zeros((4, 28, 28), np.uint8)),
    ('t10k-labels-idx1-ubyte', np.arange(4, dtype=np.uint8)),
  )
  for name, x in (*pairs, *others):
    (folder / name).write_bytes(b'\0\0\x08' + bytes([x.ndim]) + struct.pack(f'>{x.ndim}I', *x.shape) + x.tobytes())
  return str(folder)


LABELS = (np.arange(6) % 10).astype(np.uint8)


@pytest.mark.parametrize('images, labels, words', [
  ((6, 28, 28), LABELS[:5], r'train-images-idx3-ubyte has 6 pictures and train-labels-idx1-ubyte 5 labels'),
  ((6, 32, 32), LABELS, r'train-images-idx3-ubyte has shape \(6, 32, 32\)'),
  ((6, 28, 28), LABELS + 5, r'train-labels-idx1-ubyte: 1 of 6 labels are not one of 10 classes, the first is 10'),
])  # fmt: skip
def test_idx_files_are_checked_before_they_are_prepared(tmp_path, images, labels, words):
  source = idx(tmp_path / 'idx', np.zeros(images, np.uint8), labels)
  with pytest.raises(data.DataError, match=words):
    data.load_arrays('fashion_mnist', 'train', folder=str(tmp_path / 'prepared'), source=source)


def test_both_a_packed_and_a_plain_file_are_told(tmp_path, warned):
  source = idx(tmp_path / 'idx', np.zeros((6, 28, 28), np.uint8), LABELS)
  path = tmp_path / 'idx/train-labels-idx1-ubyte'
  path.with_name(path.name + '.gz').write_bytes(gzip.compress(path.read_bytes()))
  data.load_arrays('fashion_mnist', 'train', folder=str(tmp_path / 'prepared'), source=source)
  assert 'both train-labels-idx1-ubyte and train-labels-idx1-ubyte.gz are there; the packed one is read' in warned()


# What a file may ask for


def test_a_picture_is_refused_by_its_header():
  file = io.BytesIO()
  Image.new('L', (8, 8)).save(file, 'PNG')
  raw = bytearray(file.getvalue())
  raw[16:24] = struct.pack('>II', 60_000, 60_000)
  raw[29:33] = struct.pack('>I', zlib.crc32(raw[12:29]))
  with pytest.raises((OSError, ValueError), match='pixels'):
    decode(bytes(raw))


def test_a_picture_is_decoded_by_no_other_program():
  """Ghostscript would run what an EPS file says, whatever its name."""
  with pytest.raises(ValueError, match='it is not a picture'):
    decode(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n')


def test_arrays_that_claim_more_than_their_file_holds(tmp_path):
  import zipfile

  head = io.BytesIO()
  np.lib.format.write_array_header_1_0(head, {'descr': '|u1', 'fortran_order': False, 'shape': (1 << 32,)})
  with zipfile.ZipFile(tmp_path / 'train.npz', 'w', zipfile.ZIP_DEFLATED) as file:
    file.writestr('image.npy', head.getvalue() + bytes(1000))
    file.writestr('label.npy', head.getvalue() + bytes(1000))
  with pytest.raises(data.DataError, match=r"'image' of shape \(4294967296,\) claims 21.5 GB of .+ in its file"):
    data.load_arrays('arrays', 'train', source=str(tmp_path))


def test_a_packed_idx_file_that_claims_too_much(tmp_path):
  source = idx(tmp_path / 'idx', np.zeros((6, 28, 28), np.uint8), LABELS)
  path = tmp_path / 'idx/train-images-idx3-ubyte.gz'
  path.write_bytes(gzip.compress(b'\0\0\x08\3' + struct.pack('>3I', 2_000_000, 28, 28) + bytes(1000)))
  with pytest.raises(data.DataError, match=r'of shape \(2000000, 28, 28\), claims 1.57 GB of .+ in its file'):
    data.load_arrays('fashion_mnist', 'train', folder=str(tmp_path / 'prepared'), source=source)


@pytest.mark.parametrize('how', ['device', 'pipe', 'folder'])
def test_what_is_no_file_is_not_read(tmp_path, how):
  import os

  path = tmp_path / 'x.txt'
  {'device': lambda: path.symlink_to('/dev/zero'), 'pipe': lambda: os.mkfifo(path), 'folder': path.mkdir}[how]()
  with pytest.raises(data.DataError, match=r'x.txt cannot be read: (it is not a regular file|Is a directory)'):
    data.read_lines(path)
  with pytest.raises(data.VideoError, match='it is not a regular file'):
    data.read_video(path)


# A third trial


@pytest.mark.parametrize('channels', [1, 3])
def test_channels_that_come_first_are_refused(tmp_path, channels):
  np.savez(tmp_path / 'train.npz', image=np.zeros((4, channels, 16, 16), np.uint8), label=np.arange(4))
  with pytest.raises(data.DataError, match=r'whose channels seem to come first; store np.moveaxis\(image, 1, -1\)'):
    data.load_arrays('arrays', 'train', source=str(tmp_path))


def test_a_fourth_band_is_not_dropped():
  file = io.BytesIO()
  Image.new('RGBA', (4, 4), (1, 2, 3, 4)).save(file, 'TIFF')
  raw = file.getvalue()
  entry = struct.pack('<HHI', 338, 3, 1)  # ExtraSamples: unspecified, and no transparency
  at = raw.index(entry)
  raw = raw[: at + 8] + struct.pack('<I', 0) + raw[at + 12 :]
  with pytest.raises(ValueError, match='it has 4 bands, of which 3 would be read'):
    decode(raw)


@pytest.mark.parametrize('bits, expected', [(0, [30, 20, 10]), (8, [BACKGROUND] * 3)])
def test_padding_of_a_tga_is_no_transparency(bits, expected):
  raw = struct.pack('<BBBHHBHHHHBB', 0, 0, 2, 0, 0, 0, 0, 0, 1, 1, 32, 0x20 | bits) + bytes([10, 20, 30, 0])
  assert np.asarray(decode(raw)).reshape(-1).tolist() == expected


@pytest.mark.parametrize('size, whole', [((24, 32), True), ((96, 128), True), ((64, 48), False)])
def test_a_film_that_changes_its_shape_is_refused(tmp_path, size, whole):
  for name, own in (('a', (48, 64)), ('b', size)):
    film(tmp_path / f'{name}.ts', size=own, rate=25, codec='mpeg2video')
  joined = tmp_path / 'joined.ts'
  joined.write_bytes((tmp_path / 'a.ts').read_bytes() + (tmp_path / 'b.ts').read_bytes())
  if whole:
    assert data.read_video(joined).frames.shape[1:] == (48, 64, 3)
  else:
    with pytest.raises(data.VideoError, match=r'its frames change from 64x48 to 48x64 after .+ s; cut it there'):
      data.read_video(joined)
