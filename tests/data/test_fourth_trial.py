"""Inputs of a fourth trial: binarised pictures, channels first in time, transparent films, joined lists."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from kronmesh import data
from kronmesh.data.layouts import look
from kronmesh.data.pictures import decode
from kronmesh.data.triples import load_triples


@pytest.fixture
def warned(caplog):
  """What was logged, as one text."""
  logging.getLogger('absl').setLevel(logging.WARNING)
  return lambda: ' '.join(record.getMessage() for record in caplog.records)


def arrays(folder, image):
  np.savez(folder / 'train.npz', image=image, label=np.arange(len(image)))
  return data.load_arrays('arrays', 'train', source=str(folder)).inputs


@pytest.mark.parametrize(
  'dtype, most, told', [('u1', 1, True), ('u1', 200, False), ('>u2', 4095, True), ('u2', 9000, False)]
)
def test_integers_that_use_little_of_their_range_are_told(tmp_path, warned, dtype, most, told):
  found = arrays(tmp_path, np.full((4, 8, 8), most, dtype))
  assert found.max() == np.float32(most / np.iinfo(np.dtype(dtype)).max)
  assert (f'reach {most} and are divided by' in warned()) == told


def test_binary_pictures_as_bool_are_whole(tmp_path, warned):
  assert arrays(tmp_path, np.ones((4, 8, 8), bool)).max() == 1 and not warned()


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_clips_with_channels_first_are_refused(tmp_path, channels):
  with pytest.raises(data.DataError, match=r'has clips of shape .* whose channels seem to come first'):
    arrays(tmp_path, np.zeros((4, channels, 8, 16, 16), 'f4'))


@pytest.mark.parametrize('codec', ['libvpx-vp9', 'libvpx'])
def test_a_transparent_webm_lies_over_grey(tmp_path, codec):
  import av

  drawn = np.zeros((64, 96, 4), np.uint8)
  drawn[16:48, 32:64] = 255, 0, 0, 255
  with av.open(str(tmp_path / 'a.webm'), 'w') as container:
    stream = container.add_stream(codec, rate=10, options={'auto-alt-ref': '0'})
    stream.width, stream.height, stream.pix_fmt = 96, 64, 'yuva420p'
    for _ in range(10):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn, format='rgba').reformat(format='yuva420p')))
    container.mux(stream.encode())
  film = data.read_video(tmp_path / 'a.webm')
  assert film.frames.shape == (10, 64, 96, 3) and film.rate == 10
  assert film.frames[0, 3, 3].tolist() == [128] * 3
  assert np.abs(film.frames[5, 32, 48].astype(int) - [255, 0, 0]).max() < 12


MARK = b'\xef\xbb\xbf'


def graph(folder, train):
  (folder / 'train.tsv').write_bytes(train)
  (folder / 'valid.tsv').write_text('a\tr\tc\n')
  (folder / 'test.tsv').write_text('b\tr\ta\n')
  return load_triples('triples', source=str(folder))


def test_a_byte_order_mark_of_a_joined_file_is_dropped(tmp_path):
  assert graph(tmp_path, MARK + b'a\tr\tb\n' + MARK + b'b\tr\tc\n').entities == ('a', 'b', 'c')
  (tmp_path / 'table.csv').write_bytes(MARK + b'a,b\r\n1,2\r\n' + MARK + b'3,4\r\n')
  assert data.read_table(tmp_path / 'table.csv') == [{'a': '1', 'b': '2'}, {'a': '3', 'b': '4'}]


@pytest.mark.parametrize('other', ['b\u200b', '\u00a0b', 'b\ufeff', 'b\u2009'])
def test_names_that_look_the_same_are_told(tmp_path, warned, other):
  graph(tmp_path, f'a\tr\tb\nb\tr\tc\na\tr\t{other}\n'.encode())
  assert 'look the same and are two names' in warned()


def test_ucf101_lists_of_windows(tmp_path):
  for name in ('Run', 'Walk'):
    (tmp_path / 'UCF-101' / name).mkdir(parents=True)
    for k in (1, 2):
      (tmp_path / f'UCF-101/{name}/v_{name}_g0{k}_c01.avi').write_bytes(b'')
  (tmp_path / 'ucfTrainTestlist').mkdir()
  for split, k in (('train', 1), ('test', 2)):
    lines = ''.join(f'{name}\\v_{name}_g0{k}_c01.avi\r\n' for name in ('Run', 'Walk'))
    (tmp_path / f'ucfTrainTestlist/{split}list01.txt').write_text(lines)
  found = look('ucf101', tmp_path)
  assert {entry.label for entry in found.entries} == {'Run', 'Walk'} and all(e.path.is_file() for e in found.entries)


@pytest.mark.parametrize('most, told', [(4095, True), (60000, False)])
def test_dark_pictures_of_16_bits_are_told_once(warned, monkeypatch, most, told):
  monkeypatch.setattr('absl.logging._log_counter_per_token', {})
  raw = io.BytesIO()
  Image.fromarray(np.full((4, 4), most, np.uint16)).save(raw, 'PNG')
  assert np.asarray(decode(raw.getvalue())).max() == round(most * 255 / 65535)
  assert (f'reaches {most} of 65535' in warned()) == told


def test_a_pointer_of_git_lfs_is_called_so():
  with pytest.raises(ValueError, match='it is a Git LFS pointer; run `git lfs pull`'):
    decode(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
