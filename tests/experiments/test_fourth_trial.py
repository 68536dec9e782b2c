"""Commands of a fourth trial: folders whose checkpoints are gone, flag files of editors, tables of other countries."""

import shutil

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments.configs import fashion_mnist_resnet
from kronmesh.tasks.video import trec
from kronmesh.train.build import build
from kronmesh.train.checkpoints import exported_step
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.runtime import launch
from kronmesh.train.runtime.workdir import read_rows
from tests.experiments.small import rows, small


def calm(steps):
  config = small('sgd', 'data=8', steps)
  config.sgd.learning_rate = 1e-3
  return config


@pytest.mark.long
def test_a_finished_run_whose_checkpoints_are_gone_keeps_its_results(tmp_path):
  before = train(calm(6), tmp_path, quiet=True)
  shutil.rmtree(tmp_path / 'checkpoints')
  written = (tmp_path / 'metrics.jsonl').read_bytes()
  assert train(calm(6), tmp_path, quiet=True) == before
  with pytest.raises(
    ConfigError, match=r'holds the export of step 6 and no checkpoint .* config.steps=3 would begin anew'
  ):
    train(calm(3), tmp_path, quiet=True)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == written and exported_step(tmp_path) == 6


@pytest.mark.long
def test_a_run_without_a_checkpoint_begins_anew_and_says_so(tmp_path):
  train(calm(6), tmp_path, quiet=True)
  shutil.rmtree(tmp_path / 'checkpoints')
  shutil.rmtree(tmp_path / 'export')
  train(calm(6), tmp_path, quiet=True)
  words = ' '.join(event['words'] for event in read_rows(tmp_path / 'events.jsonl'))
  assert 'has no checkpoint: rows of the steps before are dropped, and the run begins anew' in words
  assert [row['step'] for row in rows(tmp_path) if 'loss' in row] == list(range(1, 7))


@pytest.mark.parametrize('first', [b'', b'# mine\r\n', b'// mine\r\n'])
def test_a_flag_file_with_a_byte_order_mark(tmp_path, first):
  (tmp_path / 'flags').write_bytes(b'\xef\xbb\xbf' + first + b'--a=1\r\n# mine\r\n--b=2\r\n')
  values = flags.FlagValues()
  for name in 'ab':
    flags.DEFINE_integer(name, 0, '', flag_values=values)
  assert launch.parse(['train.py', f'--flagfile={tmp_path}/flags'], values) == ['train.py']
  assert (values.a, values.b) == (1, 2)


def test_pictures_one_folder_too_deep(tmp_path):
  for path in ('train/images/robin', 'train/images/wren', 'test/images/robin', 'test/images/wren'):
    (tmp_path / path).mkdir(parents=True)
    for k in range(8):
      Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / path / f'{k}.png')
  config = fashion_mnist_resnet.get_config('small')
  config.data.update({'name': 'image_folder', 'folder': str(tmp_path), 'source': '', 'batch_size': 8, 'image_size': 8})
  config.model.classes, config.mesh = 2, 'data=8'
  config.data.eval_examples, config.data.augment = 0, False
  with pytest.raises(
    ConfigError, match='has one class; classes are the folders right below train and test: move them up'
  ):
    build(config)


def test_numbers_with_a_comma_in_runs_and_judgements(tmp_path):
  (tmp_path / 'run').write_text('1 Q0 a.mp4 1 0,93 mine\n')
  with pytest.raises(ConfigError, match=r"line 1: the score '0,93' is not a number, such as 0.93"):
    trec.read_run(tmp_path / 'run')
  (tmp_path / 'judged').write_text('1 0 a.mp4 1,0\n')
  with pytest.raises(ConfigError, match=r"line 1: the relevance '1,0' is not a whole number"):
    trec.read_judgements(tmp_path / 'judged')
