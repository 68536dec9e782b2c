"""Pictures in folders: names and numbers of classes, what is passed over, what is left out and how that is told."""

import os

import numpy as np
import pytest
from PIL import Image

from kronmesh import data
from kronmesh.data.folders import files_below, shown
from kronmesh.data.pictures import ENDINGS


def picture(path, value, size=(8, 8)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (value,) * 3).save(path)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
  monkeypatch.setenv('KRONMESH_DATA', str(tmp_path / 'kept'))
  return tmp_path / 'kept'


def source(root, split):
  return data.record_source('image_folder', split, folder=str(root))


def labels(root, split):
  found = source(root, split)
  return [(path.parent.name, label) for path, label in found.files]


def test_labels_of_every_split_are_numbered_by_train(tmp_path):
  for name in ('ant', 'bee', 'cat'):
    picture(tmp_path / 'train' / name / '0.png', 10)
  for name in ('bee', 'cat'):
    picture(tmp_path / 'test' / name / '0.png', 10)
  assert labels(tmp_path, 'train') == [('ant', 0), ('bee', 1), ('cat', 2)]
  assert labels(tmp_path, 'test') == [('bee', 1), ('cat', 2)]


def test_a_class_that_train_lacks_is_refused_and_one_that_test_lacks_is_told(tmp_path, caplog):
  for name in ('ant', 'bee'):
    picture(tmp_path / 'train' / name / '0.png', 10)
  picture(tmp_path / 'test/bee/0.png', 10)
  source(tmp_path, 'test')
  assert any("no pictures of class 'ant'" in r.message for r in caplog.records)
  picture(tmp_path / 'test/dog/0.png', 10)
  with pytest.raises(data.DataError, match=r"/test: train has no class 'dog', only 'ant', 'bee'; rename or move it"):
    source(tmp_path, 'test')


@pytest.mark.parametrize(
  'name', ['.ipynb_checkpoints', '.Trash-1000', '@eaDir', '__MACOSX', 'lost+found', '$RECYCLE.BIN']
)
def test_folders_of_systems_are_no_classes(tmp_path, name):
  picture(tmp_path / 'train/a/0.png', 10)
  picture(tmp_path / 'train' / name / 'files/0.png', 10)
  picture(tmp_path / 'train/a' / name / '0.png', 10)
  (tmp_path / 'train/a/._0.png').write_bytes(b'\0\5')
  found = source(tmp_path, 'train')
  assert found.names == ['a'] and len(found) == 1 and not found.left_out


def test_what_is_left_out_is_counted_and_listed(tmp_path, kept, caplog):
  picture(tmp_path / 'train/a/0.png', 10)
  picture(tmp_path / 'train/a/1.TIF', 10)
  picture(tmp_path / 'train/a/deep/er/2.jpg', 10)
  for name in ('x.heic', 'y.heic', 'notes'):
    (tmp_path / 'train/a' / name).write_bytes(b'')
  (tmp_path / 'train/labels.csv').write_text('')
  os.symlink(tmp_path / 'gone', tmp_path / 'train/a/broken.png')
  found = source(tmp_path, 'train')
  assert [p.name for p, _ in found.files] == ['0.png', '1.TIF', '2.jpg'] and len(found.left_out) == 5
  (words,) = [r.message for r in caplog.records if 'left out' in r.message]
  assert '5 of 8 files are left out (2 .heic' in words and 'labels.csv' in words
  (path,) = (kept / 'left_out').iterdir()
  lines = path.read_text().splitlines()
  assert str(path) in words and len(lines) == 5 and any(line.endswith('broken.png: broken links') for line in lines)


def test_a_class_of_train_without_pictures_is_refused_by_name(tmp_path):
  picture(tmp_path / 'train/a/0.png', 10)
  (tmp_path / 'train/b').mkdir()
  (tmp_path / 'train/b/0.heic').write_bytes(b'')
  with pytest.raises(data.DataError, match=r"/train: no picture in the folder of class 'b'; fill it, or remove it"):
    source(tmp_path, 'train')


def test_a_name_in_two_forms_of_unicode_is_one_class(tmp_path):
  picture(tmp_path / 'train' / 'caf\u00e9' / '0.png', 10)
  picture(tmp_path / 'train/tea/0.png', 10)
  picture(tmp_path / 'test' / 'cafe\u0301' / '0.png', 10)
  assert [label for _, label in source(tmp_path, 'test').files] == [0]


def test_names_that_are_no_utf8(tmp_path):
  folder = os.fsencode(tmp_path / 'train') + b'/f\xfcr'
  os.makedirs(folder)
  picture(tmp_path / 'x.png', 10)
  os.rename(tmp_path / 'x.png', folder + b'/\xe9.png')
  found = source(tmp_path, 'train')
  assert found.names == ['f\\xfcr'] and len(found[0]['image'])
  assert shown(found.files[0][0]).endswith('f\\xfcr/\\xe9.png')


def test_linked_folders_are_followed_and_circles_told(tmp_path):
  picture(tmp_path / 'disk/a/0.png', 10)
  (tmp_path / 'train').mkdir()
  os.symlink(tmp_path / 'disk/a', tmp_path / 'train/a')
  os.symlink(tmp_path / 'disk', tmp_path / 'disk/a/round')
  found = source(tmp_path, 'train')
  assert len(found) == 1 and [f.why for f in found.left_out] == ['links that lead round in a circle']


@pytest.mark.parametrize('name', ['tab\tname', 'new\nline', '\u2028', 'a\u200bb'])
def test_paths_are_shown_in_one_line(name):
  assert shown(f'/a/{name}').isprintable() and shown('/a/b\u00a0c/ü.png') == '/a/b\u00a0c/ü.png'


def test_every_ending_is_one_that_pillow_reads():
  Image.init()
  readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
  assert set(ENDINGS) <= readable


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
  def refused(self):
    raise PermissionError(13, 'Permission denied', str(self))

  (tmp_path / 'train').mkdir()
  monkeypatch.setattr('pathlib.Path.iterdir', refused)
  with pytest.raises(data.DataError, match='train cannot be read: Permission denied'):
    files_below(tmp_path / 'train', ENDINGS)


def test_training_sees_the_pixels_of_its_class(tmp_path):
  """Each label goes with the brightness of its class, in a test split that has fewer classes too."""
  for name, value in (('ant', 30), ('bee', 120), ('cat', 220)):
    picture(tmp_path / 'train' / name / '0.png', value)
    if name != 'ant':
      picture(tmp_path / 'test' / name / '0.png', value)
  means = {}
  for split in ('train', 'test'):
    (batch,) = data.record_batches(source(tmp_path, split), 4, seed=0, size=8, train=False)
    means[split] = {
      int(n): float(x.mean()) for n, x, m in zip(batch['label'], batch['inputs'], batch['mask'], strict=True) if m
    }
  assert means['test'] == {n: means['train'][n] for n in (1, 2)} and np.ptp(list(means['train'].values())) > 1
