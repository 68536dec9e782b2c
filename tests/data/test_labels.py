"""Labels and arrays that cannot be trained on are refused in one line, at the start and in every form of data."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from kronmesh import data, parallel
from kronmesh.train.errors import ConfigError
from kronmesh.train.inputs import make_data
from kronmesh.train.settings.defaults import defaults

RNG = np.random.default_rng(0)
IMAGES = RNG.random((12, 4, 4, 3)).astype(np.float32)
LABELS = np.arange(12) % 3


def source(tmp_path, train=(IMAGES, LABELS), test=None):
  for split, (image, label) in (('train', train), ('test', test or train)):
    np.savez(tmp_path / f'{split}.npz', image=image, label=label)
  return str(tmp_path)


def build(tmp_path, train=(IMAGES, LABELS), test=None, classes=3):
  config = defaults()
  config.data.name, config.data.source, config.data.batch_size = 'arrays', source(tmp_path, train, test), 4
  config.model.classes = classes
  return make_data(config, parallel.make_mesh('data=1', jax.devices()[:1]))


WRONG = {
  'from one': (LABELS + 1, r'arrays/train: 4 of 12 labels are not one of 3 classes, the first is 3; subtract 1'),
  'minus one': (
    np.where(LABELS == 2, -1, LABELS),
    r'4 of 12 labels .+ the first is -1; -1 says that there is no label',
  ),
  '255': (np.where(LABELS == 2, 255, LABELS), r'4 of 12 labels .+ the first is 255; they must be 0 to 2'),
  'floats': (LABELS + 0.7, r'labels of type float64, such as (np.float64\()?0.7\)?; number the classes from 0'),
  'one-hot': (np.eye(3)[LABELS], r'labels of shape \(12, 3\) for 12 images, not one for each; take label.argmax\(1\)'),
  'in a column': (LABELS[:, None], r'labels of shape \(12, 1\) for 12 images, not one for each'),
  'strings': (np.array(['a', 'b', 'c'])[LABELS], r'labels of type <U1'),
  'too few': (LABELS[:5], r'has 12 images and 5 labels'),
}


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('name', WRONG)
def test_labels_of_arrays(tmp_path, name, split):
  labels, words = WRONG[name]
  splits = {'train': (IMAGES, LABELS), 'test': (IMAGES, LABELS), split: (IMAGES, labels)}
  with pytest.raises(data.DataError, match=words.replace('arrays/train', f'arrays/{split}')):
    build(tmp_path, splits['train'], splits['test'])


def test_whole_numbers_of_any_type_are_labels(tmp_path):
  for kind in (np.uint8, np.int64, np.float32, bool):
    labels = (LABELS % 2).astype(kind)
    train, _, like, *_ = build(tmp_path, (IMAGES, labels))
    batch = next(train(0, 0))
    assert like['label'].dtype == np.int32 and set(np.asarray(batch['label']).tolist()) <= {0, 1}


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_integers_are_scaled(tmp_path, kind):
  most = np.iinfo(kind).max
  found = data.load_arrays('arrays', 'train', source=source(tmp_path, ((IMAGES * most).astype(kind), LABELS)))
  assert found.inputs.dtype == np.float32 and np.abs(found.inputs - IMAGES).max() <= 1 / most + 1e-6


def test_images_without_an_axis_of_channels_get_one(tmp_path):
  found = data.load_arrays('arrays', 'train', source=source(tmp_path, (IMAGES[..., 0], LABELS)))
  assert found.inputs.shape == (12, 4, 4, 1)


def damaged(value):
  images = IMAGES.copy()
  images[7, 0, 0, 0] = value
  return images


@pytest.mark.parametrize('image,words', [
  (damaged(np.nan), r'train\.npz: image 7 has values that are not finite'),
  (damaged(-np.inf), r'image 7 has values that are not finite'),
  ((IMAGES * 1000).astype(np.int32), r'images of type int32, whose range is not known; store uint8, uint16 or floats'),
  (IMAGES.astype(np.complex64), r'images of type complex64'),
  (IMAGES[:0], r'has 0 images and 12 labels'),
])  # fmt: skip
def test_images_of_arrays(tmp_path, image, words):
  with pytest.raises(data.DataError, match=words):
    data.load_arrays('arrays', 'train', source=source(tmp_path, (image, LABELS)))


def test_a_test_split_of_another_shape(tmp_path):
  with pytest.raises(ConfigError, match=r'arrays: examples of train are \(4, 4, 3\), those of test \(2, 4, 3\)'):
    build(tmp_path, test=(IMAGES[:, :2], LABELS))


def test_a_class_that_only_the_test_split_has_is_told(tmp_path, caplog):
  build(tmp_path, (IMAGES[LABELS < 2], LABELS[LABELS < 2]), (IMAGES, LABELS))
  assert any('arrays: test has labels that no example of train has: 2' in r.message for r in caplog.records)


class Source:
  """Encoded pictures with given labels, as TFDS has them."""

  def __init__(self, labels):
    file = io.BytesIO()
    Image.new('RGB', (8, 8), (9, 9, 9)).save(file, 'PNG')
    self.labels, self.picture = labels, file.getvalue()

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self.picture, 'label': self.labels[index]}


@pytest.mark.parametrize('label', [-1, 3, 255])
def test_a_label_of_records_is_refused_when_it_is_read(label):
  """It is no record that cannot be read, which the next would replace."""
  batches = data.record_batches(Source([0, 1, 2, label]), 4, seed=0, size=8, train=False, classes=3, name='own/train')
  with pytest.raises(data.DataError) as caught:
    next(data.stream(batches))
  words = f'own/train, example 3: the label is not one of 3 classes, the first is {label}; '
  assert str(caught.value).startswith(words) and '\n' not in str(caught.value)
