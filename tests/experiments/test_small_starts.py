"""The configs with which users begin on data of their own: settings that fit themselves, and minutes on two cores."""

import json
import runpy

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.fitting import batch_that_fits
from kronmesh.train.runtime.workdir import evaluations
from kronmesh.train.settings import configfile
from kronmesh.train.trained import load_model
from tests import commands


def config_of(name, **settings):
  config = runpy.run_path(str(configfile.packaged()[name]))['get_config']()
  config.update_from_flattened_dict({'devices': 0, 'mesh': 'data=-1', **settings})  # the tests have eight devices
  return config


def trained(name, workdir, **settings):
  """Trains as a user does, on one device and in a process of its own, and returns the evaluations."""
  given = [f'--config.{key}={value}' for key, value in settings.items()]
  done = commands.run('experiments/train.py', f'--config={name}', f'--workdir={workdir}', *given)
  assert done.returncode == 0, done.stderr
  return evaluations(workdir)


def draw_pictures(folder, counts):
  """Disks, squares and crosses of any colour, size and place, in folders by split and class."""
  rng = np.random.default_rng(0)
  for split, count in counts.items():
    for kind in ('cross', 'disk', 'square'):
      (folder / split / kind).mkdir(parents=True)
      for i in range(count):
        picture = Image.new('RGB', (80, 64), tuple(rng.integers(0, 90, 3).tolist()))
        pen, colour = ImageDraw.Draw(picture), tuple(rng.integers(150, 255, 3).tolist())
        x, y, r = (int(v) for v in rng.integers((24, 24, 13), (56, 40, 20)))
        if kind == 'disk':
          pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif kind == 'square':
          pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        else:
          pen.line((x - r, y, x + r, y), fill=colour, width=6)
          pen.line((x, y - r, x, y + r), fill=colour, width=6)
        picture.save(folder / split / kind / f'{i}.png')


@pytest.mark.parametrize('examples, batch', [(1, 1), (7, 1), (8, 2), (48, 8), (60, 8), (1000, 128), (10**6, 256)])
def test_a_batch_fits_itself(examples, batch):
  assert batch_that_fits(examples) == batch


def test_classes_and_batch_of_a_folder_are_counted(tmp_path):
  draw_pictures(tmp_path, {'train': 16, 'test': 4})
  config = config_of('small_images', **{'data.folder': str(tmp_path)})
  run = build(config, load=False)
  assert (config.model.classes, config.data.batch_size) == (3, 8) and run.batch['inputs'].shape == (8, 48, 48, 3)


@pytest.mark.long
def test_sixty_pictures_are_told_apart(tmp_path):
  draw_pictures(tmp_path / 'pictures', {'train': 16, 'test': 4})
  rows = trained('small_images', tmp_path / 'run', **{'data.folder': tmp_path / 'pictures'})
  assert rows[-1]['eval_accuracy'] >= 0.8, rows[-1]


def test_arrays_of_ones_own(tmp_path):
  digits = load_digits()
  x, y = digits.data.astype(np.float32) / 16, digits.target
  np.savez(tmp_path / 'train.npz', image=x[:1400], label=y[:1400])
  np.savez(tmp_path / 'test.npz', image=x[1400:], label=y[1400:])
  trained('arrays', tmp_path / 'run', **{'data.source': tmp_path, 'steps': 4, 'eval_every': 4})
  stored = json.loads((tmp_path / 'run/config.json').read_text())
  assert (stored['model']['classes'], stored['data']['batch_size']) == (10, 256)


@pytest.mark.long
def test_a_table_is_learned(tmp_path):
  digits = load_digits()
  order = np.random.default_rng(0).permutation(len(digits.data))
  x, y = digits.data[order].astype(np.float32) / 16, digits.target[order]
  np.savez(tmp_path / 'train.npz', image=x[:1400], label=y[:1400])
  np.savez(tmp_path / 'test.npz', image=x[1400:], label=y[1400:])
  rows = trained('arrays', tmp_path / 'run', **{'data.source': tmp_path})
  assert rows[-1]['eval_accuracy'] >= 0.97, rows[-1]


def test_a_subsample_becomes_a_whole_number_of_examples_and_is_told(caplog):
  build(config_of('digits_classifier', **{'data.batch_size': 112, 'kfac.subsample': 0.125}), load=False)
  assert 'config.kfac.subsample=0.125 of the 14 examples of a shard is not a whole number; 2 are taken' in caplog.text


def test_a_trained_model_predicts_as_the_run_did(tmp_path):
  """From files alone: the accuracy over the evaluation's pictures is the run's, and classes have their names."""
  draw_pictures(tmp_path / 'pictures', {'train': 16, 'test': 4})
  settings = {'data.folder': tmp_path / 'pictures', 'steps': 3, 'eval_every': 3, 'data.image_size': 32}
  rows = trained('small_images', tmp_path / 'run', **settings)
  model = load_model(tmp_path / 'run')
  paths = sorted((tmp_path / 'pictures/test').glob('*/*.png'))
  best = model.predict(model.prepare(paths)).argmax(-1)
  right = np.mean([model.names[i] == path.parent.name for i, path in zip(best, paths, strict=True)])
  assert model.names == ('cross', 'disk', 'square') and model.scores['accuracy'] == pytest.approx(right)
  assert rows[-1]['eval_accuracy'] == pytest.approx(right)
  with pytest.raises(ConfigError, match=r'inputs have the shape \(1, 8, 8, 3\), not \(examples, 32, 32, 3\)'):
    model.predict(np.zeros((1, 8, 8, 3), np.float32))
