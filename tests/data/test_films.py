"""Films as their files say they are shown: turned, mirrored, stretched, joined, late, beside a cover."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from kronmesh import data
from kronmesh.data.layouts import find, look
from kronmesh.data.video import ENDINGS
from tests.data.films import film, number_of

TURNS = {  # of the display matrix (a, b, c, d), and where the blue ground at the bottom is shown
  'a quarter clockwise': ((0, 1, -1, 0), 'left'),
  'half': ((-1, 0, 0, -1), 'top'),
  'a quarter against the clock': ((0, -1, 1, 0), 'right'),
  'mirrored': ((-1, 0, 0, 1), 'bottom'),
  'upside down': ((1, 0, 0, -1), 'top'),
  'transposed': ((0, 1, 1, 0), 'right'),
}


def scene(k, height=48, width=64):
  """Blue ground at the bottom, a yellow box that moves along the top, from the left."""
  picture = np.full((height, width, 3), 30, np.uint8)
  picture[-6:] = (0, 0, 200)
  picture[4:14, 2 * k : 2 * k + 10] = (240, 200, 40)
  return picture


def write(path, pictures, rate=10, codec='libx264', stamps=None, ratio=None, ticks=1000):
  pictures = list(pictures)
  height, width = pictures[0].shape[:2]
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
    stream.bit_rate = 2_000_000
    if ratio:
      stream.codec_context.sample_aspect_ratio = ratio
    if stamps:
      stream.codec_context.time_base = Fraction(1, ticks)
    for k, picture in enumerate(pictures):
      frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
      if stamps:
        frame.pts, frame.time_base = stamps[k], Fraction(1, ticks)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def turned(path, target, matrix):
  """The same film with this matrix in its track's header."""
  raw = bytearray(path.read_bytes())
  at = raw.find(b'tkhd') + 8 + (20 if raw[raw.find(b'tkhd') + 4] == 0 else 32) + 16
  a, b, c, d = (x << 16 for x in matrix)
  raw[at : at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
  target.write_bytes(raw)
  return target


def ground(picture):
  blue = picture[..., 2].astype(float) - picture[..., 0]
  edges = {'top': blue[:3], 'bottom': blue[-3:], 'left': blue[:, :3], 'right': blue[:, -3:]}
  return max(edges, key=lambda name: edges[name].mean())


@pytest.mark.parametrize('name', TURNS)
def test_a_film_is_turned_as_its_file_says(tmp_path, name):
  matrix, where = TURNS[name]
  plain = write(tmp_path / 'plain.mp4', map(scene, range(6)))
  path = turned(plain, tmp_path / 'turned.mp4', matrix)
  stored, shown = (data.read_video(p).frames[3] for p in (plain, path))
  assert ground(stored) == 'bottom' and ground(shown) == where
  assert shown.shape == ((64, 48, 3) if matrix[0] == 0 else (48, 64, 3))
  a, b, c, d = matrix  # a pixel in column x and row y is shown in column a x + c y and row b x + d y
  y, x = np.mgrid[:48, :64]
  column, row = a * x + c * y, b * x + d * y
  np.testing.assert_array_equal(shown[row - row.min(), column - column.min()], stored)


def test_the_short_side_is_that_of_the_film_as_shown(tmp_path):
  path = write(tmp_path / 'tall.mp4', map(scene, range(4)))
  path = turned(path, tmp_path / 'turned.mp4', TURNS['a quarter clockwise'][0])
  assert data.read_video(path, short_side=24).frames.shape == (4, 32, 24, 3)


def test_pixels_that_are_not_square(tmp_path):
  path = write(tmp_path / 'wide.mp4', (scene(k, width=32) for k in range(4)), ratio=Fraction(2, 1))
  assert data.read_video(path).frames.shape == (4, 48, 64, 3)
  assert data.read_video(path, short_side=24).frames.shape == (4, 24, 32, 3)


@pytest.mark.parametrize('ending', ['mp4', 'mkv'])
def test_a_cover_is_not_the_film(tmp_path, ending):
  path = tmp_path / f'covered.{ending}'
  with av.open(str(path), 'w') as container:
    cover, stream = container.add_stream('mjpeg', rate=1), container.add_stream('libx264', rate=10)
    cover.width, cover.height, cover.pix_fmt = 32, 32, 'yuvj420p'
    stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
    if ending == 'mkv':
      cover.disposition = type(cover.disposition).attached_pic
    white = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format='rgb24')
    container.mux([*cover.encode(white), *cover.encode()])
    for k in range(10):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(k), format='rgb24')))
    container.mux(stream.encode())
  frames = data.read_video(path).frames
  assert frames.shape == (10, 48, 64, 3) and frames.mean() < 100


@pytest.mark.parametrize('pieces', [2, 3])
def test_films_that_were_joined_are_seen_whole(tmp_path, pieces):
  """Time stamps start again in every piece."""
  paths = [film(tmp_path / f'{i}.ts', count=10, codec='mpeg2video', rate=25) for i in range(pieces)]
  (tmp_path / 'joined.ts').write_bytes(b''.join(path.read_bytes() for path in paths))
  numbers = [number_of(f) for f in data.read_video(tmp_path / 'joined.ts').frames]
  assert numbers == list(range(10)) * pieces


def test_a_broadcast_that_leaps_goes_on_at_once(tmp_path):
  """Two pieces with an hour between their time stamps."""
  for name, start in (('a', 0), ('b', 3600 * 25)):
    write(tmp_path / f'{name}.ts', map(scene, range(10)), 25, 'mpeg2video', [start + k for k in range(10)], ticks=25)
  (tmp_path / 'joined.ts').write_bytes(b''.join((tmp_path / f'{n}.ts').read_bytes() for n in 'ab'))
  assert len(data.read_video(tmp_path / 'joined.ts', rate=25).frames) == 20


@pytest.mark.parametrize('start', [-500, 0, 50_000, 12_000_000])
@pytest.mark.parametrize('name', ['late.mkv', 'late.webm'])
def test_a_film_may_begin_at_any_time_stamp(tmp_path, name, start):
  codec = 'ffv1' if name.endswith('mkv') else 'libvpx'
  path = write(tmp_path / name, map(scene, range(20)), 10, codec, [start + 100 * k for k in range(20)])
  assert len(data.read_video(path, rate=10).frames) == 20


@pytest.mark.parametrize('start', [0, 50_000])
def test_a_film_that_is_cut_off_is_still_told(tmp_path, start):
  path = write(tmp_path / 'film.mkv', map(scene, range(20)), 10, 'ffv1', [start + 100 * k for k in range(20)])
  raw = path.read_bytes()
  path.write_bytes(raw[: len(raw) // 2])
  with pytest.raises(data.VideoError, match='is cut off or damaged'):
    data.read_video(path, rate=10)


CODECS = {
  'flv': 'flv', 'ts': 'mpeg2video', '3gp': 'mpeg4', 'gif': 'gif', 'mts': 'mpeg2video', 'mxf': 'mpeg2video', 'asf': 'mpeg4',
  'vob': 'mpeg2video', 'm2ts': 'mpeg2video', 'webm': 'libvpx', 'mov': 'libx264', 'ogv': 'libvpx',
}  # fmt: skip


@pytest.mark.parametrize('ending', CODECS)
def test_every_ending_that_is_promised_is_decoded(tmp_path, ending):
  assert f'.{ending}' in ENDINGS
  pixels = 'rgb8' if ending == 'gif' else 'yuv420p'
  formats = {'mts': 'mpegts', 'm2ts': 'mpegts', 'ogv': 'ogg'}
  path = tmp_path / f'film.{ending}'
  try:
    with av.open(str(path), 'w', format=formats.get(ending)) as container:
      stream = container.add_stream(CODECS[ending], rate=25)
      stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
      for k in range(25):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(k % 20), format='rgb24')))
      container.mux(stream.encode())
  except av.error.FFmpegError:
    pytest.skip(f'FFmpeg writes no {ending} here')
  assert len(data.read_video(path, rate=5).frames) == 5


def folder_of(root, *files):
  for name in files:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def test_a_folder_of_videos_passes_over_what_systems_put_there(tmp_path):
  junk = (
    'train/a/._x.mp4',
    'train/.ipynb_checkpoints/x.mp4',
    '.cache/a/x.mp4',
    '.git/objects/x.mp4',
    'train/@eaDir/x.mp4',
  )
  folder_of(tmp_path, 'train/a/x.mp4', 'test/a/deep/y.FLV', *junk)
  assert [(e.split, e.label, e.path.name) for e in find('video_folder', tmp_path)] == [
    ('test', 'a', 'y.FLV'), ('train', 'a', 'x.mp4')
  ]  # fmt: skip


def test_files_that_are_no_videos_are_left_out_and_named(tmp_path):
  folder_of(tmp_path, 'train/a/x.mp4', 'train/a/x.srt', 'train/a/x.xyz', 'train/readme.md', 'notes.txt')
  assert sorted(f.path.name for f in look('video_folder', tmp_path).left_out) == [
    'notes.txt',
    'readme.md',
    'x.srt',
    'x.xyz',
  ]


def test_a_class_that_train_lacks_is_refused(tmp_path, caplog):
  folder_of(tmp_path, 'train/a/x.mp4', 'train/b/x.mp4', 'test/b/x.mp4')
  find('video_folder', tmp_path)
  assert any("the split test has no video of the class 'a'" in r.message for r in caplog.records)
  folder_of(tmp_path, 'test/c/x.mp4')
  with pytest.raises(data.DataError, match="the split test has the class 'c', which train lacks"):
    find('video_folder', tmp_path)


HEADER = 'label,youtube_id,time_start,time_end,split\n'


@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_two_spans_of_one_film_of_kinetics(tmp_path, mark):
  folder_of(tmp_path, *(f'{s}/abcdefghijk_{a:06}_{b:06}.mp4' for s in ('train', 'val') for a, b in ((1, 11), (50, 60))))
  rows = 'dancing,abcdefghijk,1,11,train\nsinging,abcdefghijk,50.0,60.0,train\n'
  for split in ('train', 'val'):
    (tmp_path / f'{split}.csv').write_text(f'{mark}{HEADER}{rows}', encoding='utf-8')
  labels = {(e.split, e.path.stem[-6:]): e.label for e in find('kinetics', tmp_path)}
  assert labels == {(s, end): l for s in ('train', 'test') for end, l in (('000011', 'dancing'), ('000060', 'singing'))}


def test_files_of_kinetics_that_are_named_by_their_id(tmp_path):
  """Are those of the one row that has it, of several of none."""
  folder_of(tmp_path, 'train/abcdefghijk.mp4', 'train/zzzzzzzzzzz.mp4', 'train/strange.mp4')
  rows = 'dancing,abcdefghijk,1,11,train\nsinging,zzzzzzzzzzz,1,11,train\nyoga,zzzzzzzzzzz,20,30,train\n'
  (tmp_path / 'train.csv').write_text(HEADER + rows)
  found = look('kinetics', tmp_path)
  assert [(e.path.name, e.label) for e in found.entries] == [('abcdefghijk.mp4', 'dancing')]
  assert sorted(f.path.name for f in found.left_out) == ['strange.mp4', 'zzzzzzzzzzz.mp4']


def test_rows_of_kinetics_that_contradict_each_other(tmp_path):
  folder_of(tmp_path, 'train/abcdefghijk_000001_000011.mp4')
  (tmp_path / 'train.csv').write_text(f'{HEADER}dancing,abcdefghijk,1,11,train\nsinging,abcdefghijk,1,11,train\n')
  with pytest.raises(data.DataError, match="has the labels 'dancing' and 'singing'; leave one out"):
    find('kinetics', tmp_path)
  (tmp_path / 'train.csv').write_text('id,class\nabcdefghijk,dancing\n')
  with pytest.raises(data.DataError, match="its first line has no column 'label', 'youtube_id'"):
    find('kinetics', tmp_path)


def test_a_list_of_ucf101_names_files_with_spaces_once(tmp_path):
  one, two = 'Walk Dog/v_Walk Dog_g01_c01.avi', 'Run/v_Run_g01_c01.avi'
  folder_of(tmp_path, f'UCF-101/{one}', f'UCF-101/{two}')
  (tmp_path / 'ucfTrainTestlist').mkdir()
  for split in ('train', 'test'):
    path = tmp_path / f'ucfTrainTestlist/{split}list01.txt'
    path.write_bytes(b'\xef\xbb\xbf' + f'{one} 1\r\n{two} 2\r\n'.encode())
  assert [(e.label, e.path.is_file()) for e in find('ucf101', tmp_path)] == [('Walk Dog', True), ('Run', True)] * 2
  path.write_text(f'{one} 1\n{one} 1\n')
  with pytest.raises(data.DataError, match=r'g01_c01\.avi is in the split test twice; leave one out'):
    find('ucf101', tmp_path)
