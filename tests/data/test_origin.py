"""Prepared records know what they were made of."""

import os
import shutil

import numpy as np
import pytest

from kronmesh import data
from tests.data.films import film
from tests.data.idx import write_idx


def idx(folder, brightness):
  write_idx(folder, packed=False, train=12, test=5)
  for path in folder.iterdir():
    if 'images' in path.name:
      raw = bytearray(path.read_bytes())
      raw[16:] = bytes([brightness]) * (len(raw) - 16)
      path.write_bytes(raw)
  return str(folder)


def mean(name, kept, source=''):
  return round(float(data.load_arrays(name, 'train', folder=str(kept), source=source).inputs.mean() * 255))


def films(root, *values):
  for split in ('train', 'test'):
    for label, count in zip('ab', values, strict=True):
      (root / split / label).mkdir(parents=True, exist_ok=True)
      film(root / split / label / '0.mp4', count=count)
  return str(root)


def lengths(kept, source):
  builder = data.prepared('video_folder', source, kept, rate=10, short_side=16)
  return sorted(len(example['frames']) for example in builder.as_data_source('train'))


@pytest.mark.parametrize('name', ['fashion_mnist'])
def test_a_second_source_is_refused_with_both_named(tmp_path, name):
  one, two = idx(tmp_path / 'garments', 40), idx(tmp_path / 'digits', 200)
  assert mean(name, tmp_path / 'kept', one) == 40
  with pytest.raises(data.DataError, match=r'was made of .+/garments, not of .+/digits; choose another'):
    mean(name, tmp_path / 'kept', two)
  assert mean(name, tmp_path / 'other', two) == 200


def test_a_source_that_has_changed_is_refused(tmp_path):
  source = idx(tmp_path / 'own', 40)
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  idx(tmp_path / 'own', 41)
  with pytest.raises(data.DataError, match=r'/own has changed since .+ was prepared from it .4 files then, 4 now.'):
    mean('fashion_mnist', tmp_path / 'kept', source)


def test_a_copy_of_the_source_and_one_that_is_gone_are_allowed(tmp_path):
  source = idx(tmp_path / 'own', 40)
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  shutil.copytree(source, tmp_path / 'copy')
  assert mean('fashion_mnist', tmp_path / 'kept', str(tmp_path / 'copy')) == 40
  os.utime(next((tmp_path / 'own').iterdir()))  # the same contents at another time
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  shutil.rmtree(source)
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40


def test_a_source_that_is_gone_and_never_was_this_one(tmp_path):
  source = idx(tmp_path / 'own', 40)
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  with pytest.raises(data.DataError, match=r'was made of .+/own, and .+/nowhere does not exist'):
    mean('fashion_mnist', tmp_path / 'kept', str(tmp_path / 'nowhere'))


def test_plain_and_packed_files_of_one_name_are_compared_by_what_they_hold(tmp_path):
  """A packed file comes first; another one beside the plain ones is another source."""
  source = idx(tmp_path / 'own', 40)
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  write_idx(tmp_path / 'own', packed=True, train=12, test=5)
  with pytest.raises(data.DataError, match='has changed since'):
    mean('fashion_mnist', tmp_path / 'kept', source)


def test_films_of_two_sources(tmp_path):
  one, two = films(tmp_path / 'S1', 10, 20), films(tmp_path / 'S2', 20, 10)
  assert lengths(tmp_path / 'kept', one) == [10, 20]
  with pytest.raises(data.DataError, match=r'video_folder: .+ was made of .+/S1, not of .+/S2'):
    lengths(tmp_path / 'kept', two)


def test_films_that_were_added_moved_or_renamed(tmp_path):
  source = films(tmp_path / 'own', 10, 20)
  assert lengths(tmp_path / 'kept', source) == [10, 20] == lengths(tmp_path / 'kept', source)
  extra = tmp_path / 'own/train/a/1.mp4'
  film(extra, count=5)
  with pytest.raises(data.DataError, match=r'has changed since .+ .4 files then, 5 now.'):
    lengths(tmp_path / 'kept', source)
  extra.unlink()
  assert lengths(tmp_path / 'kept', source) == [10, 20]
  (tmp_path / 'own/train/a/0.mp4').rename(tmp_path / 'own/train/b/1.mp4')  # another class
  (tmp_path / 'own/train/b/0.mp4').rename(tmp_path / 'own/train/a/0.mp4')
  with pytest.raises(data.DataError, match='has changed since'):
    lengths(tmp_path / 'kept', source)


def test_films_whose_source_is_gone(tmp_path):
  source = films(tmp_path / 'own', 10, 20)
  assert lengths(tmp_path / 'kept', source) == [10, 20]
  shutil.move(source, tmp_path / 'away')
  assert lengths(tmp_path / 'kept', source) == [10, 20]
  assert lengths(tmp_path / 'kept', str(tmp_path / 'away')) == [10, 20]  # the same films in another place
  assert lengths(tmp_path / 'kept', '') == [10, 20]


def test_records_of_an_older_release_are_taken_with_a_warning(tmp_path, caplog):
  source = idx(tmp_path / 'own', 40)
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  (path,) = (tmp_path / 'kept').rglob('*.origin.json')
  path.unlink()
  assert mean('fashion_mnist', tmp_path / 'kept', source) == 40
  assert any('do not say what they were made of' in r.message for r in caplog.records)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  def refused(self, *args, **kwargs):
    raise PermissionError(13, 'Permission denied', str(self))

  monkeypatch.setattr('pathlib.Path.mkdir', refused)
  with pytest.raises(data.DataError, match=r'cannot be written .Permission denied.; set KRONMESH_DATA or'):
    mean('fashion_mnist', tmp_path / 'kept', idx_without_mkdir(tmp_path))


def idx_without_mkdir(tmp_path):
  os.mkdir(tmp_path / 'own')
  rng = np.random.default_rng(0)
  for name, shape in (('train-images-idx3', (4, 28, 28)), ('train-labels-idx1', (4,)), ('t10k-images-idx3', (4, 28, 28)),
                      ('t10k-labels-idx1', (4,))):  # fmt: skip
    head = b'\0\0\x08' + bytes([len(shape)]) + b''.join(n.to_bytes(4, 'big') for n in shape)
    (tmp_path / f'own/{name}-ubyte').write_bytes(head + rng.integers(0, 9, shape, np.uint8).tobytes())
  return str(tmp_path / 'own')


def test_no_home_and_addresses(monkeypatch):
  for folder in ('gs://bucket/data', 's3://bucket'):
    with pytest.raises(data.DataError, match=f'{folder} is not a folder on this machine'):
      data.data_dir(folder)

  def homeless():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.delenv('KRONMESH_DATA', raising=False)
  monkeypatch.setattr('pathlib.Path.home', homeless)
  with pytest.raises(data.DataError, match='has no home folder; set KRONMESH_DATA'):
    data.data_dir()
  monkeypatch.setenv('KRONMESH_DATA', '/somewhere')
  assert str(data.data_dir()) == '/somewhere'
