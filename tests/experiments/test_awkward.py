"""Flags, config files and work folders that are wrong: one line that says what to change."""

from pathlib import Path

import numpy as np
import pytest

from experiments.configs import digits, digits_classifier, fashion_mnist_resnet
from kronmesh.tasks.video import trec
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.inputs import check_options
from kronmesh.train.runtime.profile import Profile
from kronmesh.train.runtime.workdir import claimed
from kronmesh.train.settings.overrides import check_different, parse_sweep, resolved
from kronmesh.train.settings.ranges import check_ranges, check_whole
from kronmesh.train.sweeps import sweep
from tests import commands
from tests.experiments.small import small

ROOT = Path(__file__).parents[2]
BODY = 'from experiments.configs.digits import get_config as g\ndef get_config():\n'
FILES = {'none.py': BODY + '  g()\n', 'ends.py': 'import sys\nsys.exit(0)\n', 'good.py': BODY + '  return g()\n'}
FILES['empty.py'] = (
  'from ml_collections import config_dict\n'
  + BODY
  + '  config = g()\n  with config.unlocked(), config.ignore_type():\n'
  '    config.steps = config_dict.required_placeholder(int)\n  return config\n'
)
WRONG = {
  'a placeholder': (['--config=empty.py'], 'the config file empty.py has a placeholder without a value'),
  'returns nothing': (['--config=none.py', '--config.steps=1'], "get_config() of 'none.py' returns no ConfigDict"),
  'ends the program': (['--config=ends.py'], 'the config file ends.py ends the program'),
  'is missing': (['--config=gone.py'], "no config file 'gone.py'; kronmesh configs lists all"),
  'is a folder': (['--config=folder'], "no config file 'folder'; kronmesh configs lists all"),
  'swallows a flag': (['--config', '--workdir=out'], "no config file '--workdir=out'; kronmesh configs lists all"),
  'steps=1e3': (
    ['--config=good.py', '--config.steps=1e3'],
    '--config.steps=1e3 must be a whole number, written in digits',
  ),
  'a unicode minus': (['--config=good.py', '--config.steps=\u22123'], 'must be a whole number, written in digits'),
}


@pytest.mark.long
@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.long] * (i > 1)) for i, n in enumerate(WRONG)])
def test_configs_on_the_command_line(tmp_path, name):
  for file, text in FILES.items():
    (tmp_path / file).write_text(text)
  (tmp_path / 'folder').mkdir()
  flags, words = WRONG[name]
  done = commands.run(ROOT / 'experiments/train.py', '--dry_run', *flags, cwd=tmp_path)
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('error: '), done.stderr
  assert words in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()


@pytest.mark.long
def test_help_is_help():
  done = commands.run('experiments/train.py', '--help')
  assert '--workdir' in done.stdout and 'error' not in done.stderr


@pytest.mark.parametrize('key', ['model.widths', 'steps', 'data.batch_size'])
def test_numbers_beyond_32_bits(key):
  config = digits.get_config()
  if key == 'model.widths':
    config.model.classes = 2**31
    key = 'model.classes'
  else:
    config.update_from_flattened_dict({key: 2**31})
  with pytest.raises(ConfigError, match=rf'config\.{key}=2147483648 must be in \(-2147483648, 2147483648\)'):
    check_ranges(config)


@pytest.mark.parametrize('name,make,words', [
  ('checkpoints', Path.touch, 'is not a folder, which a run keeps there'), ('export', Path.touch, 'is not a folder'),
  ('metrics.jsonl', Path.mkdir, 'is not a file, which a run keeps there'), ('about.json', Path.mkdir, 'is not a file'),
])  # fmt: skip
def test_work_folders_with_something_else_in_them(tmp_path, name, make, words):
  make(tmp_path / name)
  with pytest.raises(ConfigError, match=f'{name} {words}'), claimed(tmp_path):
    pass
  with claimed(tmp_path / 'other') as claim:
    claim.check()


def test_work_folders_that_are_none(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path / 'gone')
  (tmp_path / 'file').touch()
  for name, words in (('link', 'is a link to nowhere'), ('file', 'is a file, not a folder')):
    with pytest.raises(ConfigError, match=words), claimed(tmp_path / name):
      pass


@pytest.mark.parametrize('text,words', [
  ('seed=0..99999999999', 'counts more than 10000 values'), ('seed=0..999;steps=1..999', '999000 combinations, more than'),
  ('seed=1,', 'has an empty value; take a comma away'), ('model.widths=(8,),(16,8', 'a bracket of .* is open'),
])  # fmt: skip
def test_sweeps_that_are_none(text, words):
  with pytest.raises(ConfigError, match=words):
    parse_sweep(text, digits.get_config())


def changed(**values):
  config = digits.get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(values)
  return config


@pytest.mark.parametrize('values, words', [
  ({'sgd.learning_rte': 0.1}, "config.sgd.learning_rte is not an option; did you mean 'learning_rate'"),
  ({'data.batchsize': 8}, "config.data.batchsize is not an option; did you mean 'batch_size'"),
  ({'checkpoints_every': 5}, "config.checkpoints_every is not an option; did you mean 'checkpoint_every'"),
  ({'data.source': Path('/data')}, r"config.data.source=PosixPath\('/data'\) is of the type PosixPath; write it as text"),
  ({'steps': np.int64(4)}, r'config.steps=.+ is of the type int64; write .item\(\) behind it, or 4'),
  ({'data.folder': '~/data'}, "config.data.folder='~/data': write the whole path; ~ is expanded by shells alone"),
])  # fmt: skip
def test_own_config_files(values, words):
  with pytest.raises(ConfigError, match=words):
    check_whole(changed(**values))


@pytest.mark.parametrize('values, words', [
  ({'data.source': '/my/arrays'}, "config.data.source='/my/arrays' does nothing to config.data.name='digits'"),
  ({'data.name': 'image_folder', 'data.augment': True}, 'config.data.augment=True does nothing to'),
  ({'data.name': 'image_folder', 'data.train_examples': 4}, 'config.data.train_examples=4 does nothing to'),
  ({'data.name': 'video_folder', 'data.train_examples': 4}, 'config.data.train_examples=4 does nothing to'),
  ({'data.name': 'noise', 'data.augment': True}, 'config.data.augment=True does nothing to'),
])  # fmt: skip
def test_options_that_would_do_nothing(values, words):
  with pytest.raises(ConfigError, match=words):
    check_options(changed(**values))


@pytest.mark.parametrize('values, words', [
  ({'task': 'classify', 'target': 95.0}, "config.target=95 is never reached: the metric of 'classify' is at most 1"),
])  # fmt: skip
def test_targets_that_are_never_reached(values, words):
  with pytest.raises(ConfigError, match=words):
    check_ranges(changed(**values))


@pytest.mark.parametrize('optimizer', ['sgd', 'kfac'])
def test_models_and_batches_that_fit_no_memory(optimizer):
  config = digits_classifier.get_config()
  config.optimizer, config.model.hidden, config.mesh = optimizer, (100_000, 100_000), 'data=8'
  with pytest.raises(
    ConfigError, match=r'need .+B of memory on this machine, where .+ are free \(the largest array has shape'
  ):
    build(config)
  config.model.hidden, config.data.batch_size = (8,), 8 * 10**8
  with pytest.raises(
    ConfigError, match=r'config.data.batch_size=800000000: a batch needs \d+ GB of memory, and .+ are free'
  ):
    build(config)


def test_best_checkpoints_where_none_are_kept(tmp_path):
  config = small('sgd')
  config.keep_checkpoints, config.keep_best = 0, 2
  with pytest.raises(ConfigError, match=r'config.keep_best=2 keeps nothing where config.keep_checkpoints=0'):
    build(config)


def test_a_trace_of_steps_that_the_run_has_not():
  with pytest.raises(ConfigError, match='--profile=100:200: the run has 4 steps'):
    Profile('100:200', Path('/nowhere'), 4)


def test_members_that_would_be_the_same():
  config = digits.get_config()
  config.optimizer = 'sgd'
  with pytest.raises(ConfigError, match=r"--sweep: kfac.damping makes no difference to config.optimizer='sgd'"):
    check_different(parse_sweep('kfac.damping=0.1,0.2', config), config)
  check_different(parse_sweep('optimizer=sgd,kfac;kfac.damping=0.1', config), config)


@pytest.mark.parametrize('found, words', [
  ({'seed': 0}, 'returns dict; let it yield a dict for each member'), (None, 'returns NoneType; let it yield'),
  ([], 'yields nothing'), ([1], 'yields 1, not a dict of settings by their keys'),
])  # fmt: skip
def test_functions_that_yield_no_members(monkeypatch, found, words):
  monkeypatch.setattr(sweep, 'config_path', lambda: 'own.py')
  with pytest.raises(ConfigError, match=words):
    sweep.yielded(lambda: found)


def test_numbers_of_numpy_are_numbers():
  config = digits.get_config()
  (found,) = [resolved(own, config) for own in [{'sgd.learning_rate': np.float64(0.5)}]]
  assert found == {'sgd.learning_rate': 0.5} and type(found['sgd.learning_rate']) is float


@pytest.mark.parametrize('text', ['{"config": ', '[]', '{}', '{"config": 1, "members": [1]}'])
def test_a_sweep_whose_states_cannot_be_read_starts_all_members(tmp_path, capsys, text):
  (tmp_path / 'sweep.json').write_text(text)
  config = digits.get_config()
  member = sweep.Member('seed=0', {'seed': 0}, str(tmp_path / 'members/seed=0'))
  assert sweep.Sweep(config, tmp_path, [member]).waiting() == [member]
  assert 'sweep.json cannot be read: all members are started again' in capsys.readouterr().err


def test_splits_that_are_stored_differently_are_told(tmp_path, caplog):
  rng = np.random.default_rng(0)
  np.savez(tmp_path / 'train.npz', image=(rng.random((16, 8, 8)) * 255).astype('u1'), label=np.arange(16) % 10)
  np.savez(tmp_path / 'test.npz', image=(rng.random((8, 8, 8)) * 255).astype('f4'), label=np.arange(8) % 10)
  config = small('sgd')
  config.data.name, config.data.source, config.data.eval_split = 'arrays', str(tmp_path), 'test'
  config.data.batch_size = config.data.eval_batch_size = 8
  with caplog.at_level('WARNING', 'absl'):
    build(config)
  assert 'are both stored in the same way?' in caplog.text


@pytest.mark.parametrize('judged, words', [
  ('a 0 my film.mp4 1\na 0 other.mp4 1\n', 'line 2: has 4 fields and the first line 5; write a space in a name as %20'),
])  # fmt: skip
def test_judgements_with_a_space_in_a_name(tmp_path, judged, words):
  (tmp_path / 'q.txt').write_text(judged)
  with pytest.raises(ConfigError, match=words):
    trec.read_judgements(tmp_path / 'q.txt')


def test_distances_in_place_of_scores_are_told(tmp_path):
  lines = [f'a Q0 d{k} {k + 1} {0.1 * k} knn' for k in range(4)]
  (tmp_path / 'run.txt').write_text('\n'.join(lines))
  assert trec.contradicted(tmp_path / 'run.txt') == ['a']
  (tmp_path / 'run.txt').write_text('\n'.join(line.replace(' 0.', ' -0.') for line in lines))
  assert trec.contradicted(tmp_path / 'run.txt') == []


def test_junk_is_judged_and_not_relevant():
  judged = lambda value: {f'd{k}': trec.Judgement('1', value if k % 2 else k) for k in range(5)}  # noqa: E731
  documents = [f'd{k}' for k in range(5)]
  assert trec.inferred_precision(documents, judged(-2)) == trec.inferred_precision(documents, judged(0))
  assert trec.inferred_precision(documents, judged(-1)) != trec.inferred_precision(documents, judged(0))


def test_flat_inputs_of_a_network_of_pictures(tmp_path):
  for split in ('train', 'test'):
    np.savez(tmp_path / f'{split}.npz', image=np.zeros((16, 784), np.float32), label=np.arange(16) % 10)
  config = fashion_mnist_resnet.get_config()
  config.mesh, config.data.name, config.data.source, config.data.batch_size = 'data=8', 'arrays', str(tmp_path), 8
  config.data.augment = False
  with pytest.raises(ConfigError, match=r'resnet needs inputs of shape \(height, width, channels\), and those'):
    build(config)
