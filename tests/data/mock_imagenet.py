"""ImageNet's form without its images: a prepared TFDS data set of noise."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Ten images of noise under the name, version and features of TFDS's imagenet2012, encoded as there."""

  VERSION = tfds.core.Version('5.1.0')
  pkg_dir_path = Path(__file__).parent

  def _info(self):
    features = {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=1000),
      'file_name': tfds.features.Text(),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), description='Mock data.')

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(12), 'validation': self._generate_examples(10)}

  def _generate_examples(self, n):
    rng = np.random.default_rng(0)
    for i in range(n):
      file = io.BytesIO()
      PIL.Image.fromarray(rng.integers(0, 256, (40 + i, 60, 3), np.uint8)).save(file, 'JPEG')
      file.seek(0)
      yield i, {'image': file, 'label': 7 * i, 'file_name': f'{i}.JPEG'}
