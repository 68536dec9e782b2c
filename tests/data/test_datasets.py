"""Data sets are prepared once, as array_record, without TensorFlow, and a missing one is named."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets

from kronmesh import data
from kronmesh.data import DataError
from tests.data.idx import write_idx


def test_digits_are_scikit_learns(tmp_path):
  train, test = (data.load_arrays('digits', split, folder=str(tmp_path)) for split in ('train', 'test'))
  given = sklearn.datasets.load_digits()
  assert train.inputs.shape == (1498, 8, 8, 1) and test.inputs.shape == (299, 8, 8, 1)
  images = np.concatenate([train.inputs, test.inputs])[..., 0] * 16
  assert sorted(map(bytes, images.astype(np.uint8))) == sorted(map(bytes, given.images.astype(np.uint8)))
  labels = {bytes(image.astype(np.uint8)): label for image, label in zip(given.images, given.target, strict=True)}
  assert all(
    labels[bytes(image)] == label
    for image, label in zip(images.astype(np.uint8), [*train.label, *test.label], strict=True)
  )
  assert list(tmp_path.rglob('*.array_record*')), 'kept for the next run'
  again = data.load_arrays('digits', 'test', folder=str(tmp_path))
  np.testing.assert_array_equal(again.inputs, test.inputs)


@pytest.mark.parametrize('packed', [False, True], ids=['plain', 'gzip'])
def test_fashion_mnist_from_idx_files(tmp_path, packed):
  written = write_idx(tmp_path / 'idx', packed, train=12, test=5)
  for split, (images, labels) in written.items():
    arrays = data.load_arrays('fashion_mnist', split, folder=str(tmp_path / 'data'), source=str(tmp_path / 'idx'))
    pairs = {(bytes(i), int(n)) for i, n in zip(images, labels, strict=True)}
    pixels = np.rint(arrays.inputs[..., 0] * 255).astype(np.uint8)
    assert {(bytes(i), int(n)) for i, n in zip(pixels, arrays.label, strict=True)} == pairs


@pytest.mark.long
def test_processes_that_prepare_a_set_at_once_wait_for_one_of_them(tmp_path):
  write_idx(tmp_path / 'idx', False, train=3000, test=5)
  where = {'folder': str(tmp_path), 'source': str(tmp_path / 'idx')}
  code = f"from kronmesh import data; print(len(data.load_arrays('fashion_mnist', 'train', **{where}).label))"
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  start = lambda: subprocess.Popen([sys.executable, '-c', code], **pipes)  # noqa: E731
  told = [process.communicate(timeout=300) for process in [start() for _ in range(3)]]
  assert [out for out, _ in told] == ['3000\n'] * 3, told
  assert sum('preparing fashion_mnist_idx' in err for _, err in told) == 1


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(DataError, match='no IDX files in /nowhere; install'):
    data.load_arrays('fashion_mnist', 'train', folder=str(tmp_path), source='/nowhere')
  with pytest.raises(DataError, match="data set 'cifar' is unknown"):
    data.load_arrays('cifar', 'train')
  with pytest.raises(DataError, match="split 'valid' is unknown"):
    data.load_arrays('digits', 'valid')
  with pytest.raises(DataError, match=f'imagenet2012: no array_record data set in {tmp_path}') as error:
    data.record_source('imagenet2012', 'train', folder=str(tmp_path))
  assert '\n' not in str(error.value)


@pytest.fixture
def imagenet(imagenet_folder):
  return data.record_source('imagenet2012', 'validation', folder=str(imagenet_folder))


def test_imagenet_batches_of_mock_data(imagenet):
  settings = {'batch_size': 4, 'seed': 0, 'size': 32}
  train = data.record_batches(imagenet, train=True, **settings)
  whole = train[3]
  assert whole['inputs'].shape == (4, 32, 32, 3) and whole['inputs'].dtype == np.float32
  assert np.isfinite(whole['inputs']).all() and whole['label'].shape == (4,)
  np.testing.assert_array_equal(whole['inputs'], data.record_batches(imagenet, train=True, **settings)[3]['inputs'])
  held_out = data.record_batches(imagenet, train=False, **settings)
  assert [batch['mask'].sum() for batch in held_out] == [4, 4, 2]


def test_imagenet_parts_of_processes_make_up_the_batch(imagenet):
  settings = {'batch_size': 4, 'seed': 0, 'size': 32, 'train': True}
  whole = data.record_batches(imagenet, **settings)[2]
  parts = [data.record_batches(imagenet, shard=(i, 2), **settings)[2] for i in range(2)]
  for i, part in enumerate(parts):
    np.testing.assert_array_equal(part['inputs'], whole['inputs'][i::2])


def test_text_is_of_python_s_library():
  train, test = (data.load_arrays('python_text', split) for split in ('train', 'test'))
  for split in (train, test):
    assert (
      split.inputs.shape[1:] == (65,) and split.inputs.dtype == np.int32 and split.label.shape == (len(split.inputs),)
    )
    assert split.inputs.min() >= 0 and split.inputs.max() < 128
  assert len(train.inputs) > 10_000 and len(test.inputs) == 2048
  text = bytes(train.inputs.astype(np.uint8).ravel())
  assert b'import ' in text and bytes(test.inputs[:20].astype(np.uint8).ravel()) not in text
  np.testing.assert_array_equal(data.load_arrays('python_text', 'train').inputs, train.inputs)


def test_points_carry_the_solution_of_poisson_s_equation():
  test = data.load_arrays('poisson', 'test')
  assert test.inputs.shape == (1024, 2) and abs((test.label**2).mean() - 0.25) < 1e-6
  # On the grid itself: five-point differences, whose error is of second order in h = 1/32.
  u = test.label.reshape(32, 32)
  laplacian = (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]) * 32**2
  np.testing.assert_allclose(-laplacian, 5 * np.pi**2 * u[1:-1, 1:-1], rtol=0.01, atol=0.1)
  points = data.load_arrays('poisson', 'train').inputs
  assert points.shape == (16384, 2) and points.min() >= 0 and points.max() <= 1


@pytest.mark.long
def test_tensorflow_is_never_imported(tmp_path):
  code = (
    'import sys; from kronmesh import data, models, parallel, kron; '
    f"data.load_arrays('digits', 'train', folder={str(tmp_path)!r}); "
    "sys.exit('tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, '-c', code], check=False, timeout=300).returncode == 0


@pytest.fixture
def folder(tmp_path):
  """Two classes of images of several sizes, 12 to train and 4 to test."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for split, count in (('train', 6), ('test', 2)):
    for label, name in enumerate(('cat', 'dog')):
      (tmp_path / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (20 + i, 24, 3), np.uint8) // 2 + 127 * label
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f'{i}.png')
  return tmp_path


def test_an_image_folder(folder):
  source = data.record_source('image_folder', 'train', folder=str(folder))
  assert len(source) == 12 and source.classes == 2
  (batch,) = data.record_batches(source, 12, seed=0, size=16, train=False)
  assert batch['inputs'].shape == (12, 16, 16, 3) and batch['label'].tolist() == [0] * 6 + [1] * 6
  assert batch['inputs'][6:].mean() > batch['inputs'][:6].mean() + 1
  with pytest.raises(DataError, match=r'no images in .+/val/CLASS/'):
    data.record_source('image_folder', 'val', folder=str(folder))


def test_a_record_that_cannot_be_read_is_replaced_by_the_next(folder, caplog):
  def batches():
    source = data.record_source('image_folder', 'train', folder=str(folder))
    return data.record_batches(source, 12, seed=0, size=16, train=False)

  paths = sorted((folder / 'train').rglob('*.png'))
  whole = list(batches())
  paths[3].write_bytes(paths[3].read_bytes()[:200])  # truncated
  paths[4].write_bytes(b'')
  found = list(batches())
  for i in range(12):
    np.testing.assert_array_equal(found[0]['inputs'][i], whole[0]['inputs'][5 if i in (3, 4) else i])
  words = [r.message for r in caplog.records if 'cannot be read' in r.message]
  assert len(words) == 2 and all('the next one takes its place' in w for w in words)


def test_too_many_records_that_cannot_be_read(folder):
  for path in (folder / 'train').rglob('*.png'):
    path.write_bytes(b'no image')
  batches = data.record_batches(
    data.record_source('image_folder', 'train', folder=str(folder)), 4, seed=0, size=16, train=True
  )
  with pytest.raises(DataError, match=r'record \d+ of 12 .+ cannot be read: it is not a picture, and \d+ others; mend'):
    next(data.stream(batches))


@pytest.mark.parametrize('how', ['truncated', 'empty'])
def test_prepared_data_that_cannot_be_read(tmp_path, how):
  data.load_arrays('digits', 'train', folder=str(tmp_path))
  path = max(tmp_path.rglob('*array_record*'), key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes()[: 1000 if how == 'truncated' else 0])
  with pytest.raises(
    DataError, match=r'digits: what is prepared in .+ cannot be read .+; remove it to prepare it anew'
  ):
    data.load_arrays('digits', 'train', folder=str(tmp_path))


def test_sources_that_cannot_be_read(tmp_path):
  write_idx(tmp_path / 'idx', packed=False, train=8, test=4)
  images = tmp_path / 'idx' / 'train-images-idx3-ubyte'
  images.write_bytes(images.read_bytes()[:100])
  with pytest.raises(DataError, match=r'is cut off: it has 84 of the 6272 bytes'):
    data.load_arrays('fashion_mnist', 'train', folder=str(tmp_path / 'data'), source=str(tmp_path / 'idx'))


def test_some_examples_of_each_class():
  """As many of each as of any other, the same for a seed; fewer than classes, or more than there are, is one clear line."""
  arrays = data.Arrays(np.arange(60.0).reshape(60, 1), np.arange(60) % 4)
  some = data.some_of_each(arrays, 10, seed=3)
  assert sorted(np.bincount(some.label)) == [2, 2, 3, 3]
  assert all(some.label == some.inputs[:, 0] % 4) and (np.diff(some.inputs[:, 0]) > 0).all()
  np.testing.assert_array_equal(some.inputs, data.some_of_each(arrays, 10, seed=3).inputs)
  assert (some.inputs != data.some_of_each(arrays, 10, seed=4).inputs).any()
  with pytest.raises(data.DataError, match='3 examples leave some of 4 classes without any; take 4 at least'):
    data.some_of_each(arrays, 3, seed=0)
  with pytest.raises(data.DataError, match='64 examples are 16 of class 0, which has 15; take fewer'):
    data.some_of_each(arrays, 64, seed=0)


def test_arrays_of_the_users_own(tmp_path):
  own = data.Arrays(np.random.default_rng(0).random((5, 4, 4, 1), np.float32), np.arange(5, dtype=np.int32))
  data.write_arrays(own, tmp_path / 'set' / 'train.npz')
  read = data.load_arrays('arrays', 'train', source=str(tmp_path / 'set'))
  for a, b in zip(read, own, strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(data.DataError, match=r'test\.npz cannot be read: No such file'):
    data.load_arrays('arrays', 'test', source=str(tmp_path / 'set'))
  np.savez(tmp_path / 'set' / 'test.npz', image=own.inputs, label=own.label[:3])
  with pytest.raises(data.DataError, match='has 5 images and 3 labels'):
    data.load_arrays('arrays', 'test', source=str(tmp_path / 'set'))


def test_arrays_are_decoded_once_while_their_files_stay_the_same(tmp_path):
  where = {'folder': str(tmp_path / 'data'), 'source': str(tmp_path / 'idx')}
  write_idx(tmp_path / 'idx', False, train=12, test=5)
  train = data.load_arrays('fashion_mnist', 'train', **where)
  assert data.load_arrays('fashion_mnist', 'train', **where) is train
  with pytest.raises(ValueError, match='read-only'):
    train.inputs[0] = 0
  shutil.rmtree(tmp_path / 'data')
  shutil.rmtree(tmp_path / 'idx')
  written = write_idx(tmp_path / 'idx', False, train=9, test=5)
  again = data.load_arrays('fashion_mnist', 'train', **where)
  assert len(again.label) == len(written['train'][1]) == 9
