"""TFDS sets of the user's own: labels and pictures of several kinds, or one line that says what is missing."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from kronmesh import data, parallel
from kronmesh.train.errors import ConfigError
from kronmesh.train.inputs import make_data
from kronmesh.train.settings.defaults import defaults

F = tfds.features
PICTURE, CLASS = F.Image(encoding_format='png'), F.ClassLabel(num_classes=2)


def picture(value):
  file = io.BytesIO()
  Image.new('RGB', (20, 20), (value,) * 3).save(file, 'PNG')
  file.seek(0)
  return file


def made(root, features, example, splits=('train', 'test')):
  """Prepares a set 'own' of 12 examples a split, made by `example(i, split)`."""

  class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = Path(root)

    def _info(self):
      return self.dataset_info_from_configs(features=F.FeaturesDict(features), description='Own.')

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
      yield from ((i, example(i, split)) for i in range(12))

  tfds.disable_progress_bar()
  Own(data_dir=root, file_format='array_record').download_and_prepare()
  return str(root)


def build(folder, task='classify', classes=2):
  config = defaults()
  config.data.update({'name': 'own', 'folder': folder, 'batch_size': 12, 'image_size': 16})
  config.task, config.model.classes = task, classes
  _, held_out, *_ = make_data(config, parallel.make_mesh('data=1', jax.devices()[:1]))
  return next(iter(held_out()))


GOOD = {
  'class label': ({'image': PICTURE, 'label': CLASS}, lambda i, s: {'image': picture(40 + 170 * (i % 2)), 'label': i % 2}),
  'int64': ({'image': PICTURE, 'label': np.int64}, lambda i, s: {'image': picture(40 + 170 * (i % 2)), 'label': i % 2}),
  'scalar': ({'image': PICTURE, 'label': F.Scalar(np.int32)},
             lambda i, s: {'image': picture(40 + 170 * (i % 2)), 'label': i % 2}),
  'another name': ({'img': PICTURE, 'label': CLASS}, lambda i, s: {'img': picture(40 + 170 * (i % 2)), 'label': i % 2}),
  'tensor': ({'image': F.Tensor(shape=(20, 20, 3), dtype=np.uint8), 'label': CLASS},
             lambda i, s: {'image': np.full((20, 20, 3), 40 + 170 * (i % 2), np.uint8), 'label': i % 2}),
  'two labels': ({'image': PICTURE, 'labels': F.Sequence(CLASS), 'label': CLASS},
                 lambda i, s: {'image': picture(40 + 170 * (i % 2)), 'labels': [0, 1], 'label': i % 2}),
}  # fmt: skip


@pytest.mark.parametrize('name', GOOD)
def test_sets_that_are_read(tmp_path, name):
  """Labels go with the brightness of their pictures."""
  batch = build(made(tmp_path, *GOOD[name]))
  bright = np.asarray(batch['inputs']).mean((1, 2, 3)) > 0
  np.testing.assert_array_equal(np.asarray(batch['label']), bright.astype(int))


REFUSED = {
  'text': ({'image': PICTURE, 'label': F.Text()}, lambda i, s: {'image': picture(40), 'label': 'ab'[i % 2]},
           "own: 'label' is Text, not a number; prepare the set with a ClassLabel"),
  'no label': ({'image': PICTURE}, lambda i, s: {'image': picture(40)}, "own has no feature 'label', which"),
  'no picture': ({'label': CLASS, 'x': F.Tensor(shape=(3,), dtype=np.float32)},
                 lambda i, s: {'label': i % 2, 'x': np.zeros(3, np.float32)}, 'own: the set has no picture, only'),
  'two pictures': ({'left': PICTURE, 'right': PICTURE, 'label': CLASS},
                   lambda i, s: {'left': picture(1), 'right': picture(2), 'label': 0}, 'own: the set has several pictures'),
  'no labels in test': ({'image': PICTURE, 'label': CLASS},
                        lambda i, s: {'image': picture(40), 'label': i % 2 if s == 'train' else -1},
                        'own/test, example 0: the label is not one of 2 classes, the first is -1'),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_sets_that_are_refused(tmp_path, name):
  features, example, words = REFUSED[name]
  with pytest.raises((ConfigError, data.DataError), match=words):
    build(made(tmp_path, features, example))


def test_pictures_alone_are_enough_where_labels_are_not_used(tmp_path):
  features, example, _ = REFUSED['no label']
  batch = build(made(tmp_path, features, example), task='reconstruct', classes=0)
  assert batch['inputs'].shape == (12, 16, 16, 3)
