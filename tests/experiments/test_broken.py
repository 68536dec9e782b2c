"""Some hundred broken configs, flags, data files and checkpoints: each ends in one line and a code, and spoils nothing."""

import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from experiments.configs import digits
from kronmesh.commands.train import main
from kronmesh.train.loop import train
from kronmesh.train.runtime import launch
from kronmesh.train.settings.ranges import RANGES
from tests import commands
from tests.data.idx import write_idx
from tests.experiments.small import losses, small

ROOT = Path(__file__).parents[2]
CONFIG = 'experiments/configs/digits.py'
# A run of some milliseconds, for what is not broken enough to end before it trains.
QUICK = [f'--config={CONFIG}', '--config.model.widths=(16,8)', '--config.data.batch_size=64', '--config.steps=3']
QUICK += ['--config.devices=8', '--config.eval_every=3', '--config.writers.tensorboard=False']


def command(capsys, monkeypatch, argv):
  """experiments/train.py in this process: (exit code, stderr)."""
  values = flags.FlagValues()
  settings = launch.define('runs/train', values)
  for name in (
    'dry_run',
    'profile',
    'coordinator_address',
    'num_processes',
    'process_id',
    'debug',
    'compilation_cache',
  ):
    flags.FLAGS[name].unparse()
    values[name] = flags.FLAGS[name]
  flags.FLAGS.mark_as_parsed()
  capsys.readouterr()
  monkeypatch.setattr(sys, 'argv', ['train.py', *argv])  # where config_flags looks for overrides
  sys.modules.pop('config_config', None)  # the last case's file
  commands.stay(monkeypatch)
  try:
    rest = launch.parse(['train.py', *argv], values)
    launch.guarded(lambda argv: launch.run(main, settings, argv))(rest)
    code = 0
  except SystemExit as ended:
    code = ended.code
  return code, capsys.readouterr().err


def told(code, err, allowed=(2, 3)):
  """Exactly one line says what is wrong; warnings may come before."""
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert code in allowed and len(lines) == 1 and len(lines[0]) > 20, (code, err)
  assert 'Traceback' not in err and len(lines[0]) < 900, err
  return lines[0]


def leaves(config, path=''):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', value


LEAVES = dict(leaves(digits.get_config()))
WRONG_TYPES = [f'--config.{k}={v}' for k, old in LEAVES.items() if not isinstance(old, str) for v in ('x', '[1')]
MISSPELT = [f'--config.{k[:-1]}={v}' for k, v in LEAVES.items() if k[:-1] not in LEAVES and not k[:-1].endswith('.')]
OUTSIDE = {'>= 0': '-1', '>= 1': '0', '> 0': '0', '> 1': '1', '[0, 1)': '1', '(0, 1]': '1.5'}
BEYOND = [
  [f'--config.optimizer={name.partition(".")[0]}', f'--config.{name}={OUTSIDE[rule]}']
  if own
  else [f'--config.{path}={OUTSIDE[rule]}']
  for path, rule in RANGES.items()
  for name, own in ([(path, False)] if path in LEAVES else [(k, True) for k in LEAVES if k.endswith(f'.{path}')])
]
NOT_FINITE = [
  f'--config.{k}={v}' for k, old in LEAVES.items() if isinstance(old, float) and '.' not in k for v in ('nan', 'inf')
]
NOT_FINITE += [
  f'--config.kfac.{k}={v}' for k in ('damping', 'learning_rate', 'kl_clip', 'decay') for v in ('nan', 'inf', '-inf')
]
WORDS = [
  '--config.optimizer=kfacc',
  '--config.optimizer=shampoo',
  '--config.task=clasify',
  '--config.model.name=mpl',
  '--config.data.name=digit',
  '--config.data.eval_split=valid',
  '--config.mesh=data',
  '--config.mesh=data=0',
  '--config.mesh=data=3',
  '--config.mesh=data=-1,model=-1',
  '--config.mesh=data=4,data=2',
  '--config.mesh=date=8',
  '--config.mesh=data=16',
  '--config.data.batch_size=63',
  '--config.data.batch_size=2',
  '--config.data.eval_batch_size=3',
  '--config.model.dtype=float8',
  '--config.model.widths=(0,)',
  '--config.model.widths=(-4,8)',
  "--config.model.widths=('a',)",
  '--config.kfac.fisher=true',
  '--config.kfac.schedule=cosin',
  '--config.kfac.warmup_steps=3',
  '--config.recipe.rate_scaling=cubic',
  '--config.recipe.mixup=0.2',
  '--config.recipe.rescale_weights=("nothing*",)',
  '--config.placement.inverses=some',
  '--config.placement.inverses=OWNERS',
  '--config.placement.statistics=int4',
  '--config.gradients.all_reduce=star',
  '--config.gradients.half=int8',
  '--config.gradients.all_reduce=ring',
  '--config.gradients.half=bfloat16',
  '--config.faults.not_finite=ignore',
  '--config.faults.spike=skp',
  '--config.microbatches=7',
  '--config.stop_at_target=True --config.target=0',
  '--config.kfac.subsample=0.3',
  '--config.writers.wandb=x',
  '--config.optimizer=sgd --config.faults.spike=damp',
  '--config.keep_checkpoints=0 --config.faults.spike=rollback',
  '--config.optimizer=natural_gradient --config.microbatches=2',
  '--config.devices=-1',
  '--config.optimizer=adaptive_kfac --config.recipe.loss_scale=8',
  '--config.data.name=image_folder',
  '--config.data.name=image_folder --config.data.folder=/nowhere',
  '--config.data.name=imagenet2012 --config.data.folder=/nowhere',
  '--config.data.name=fashion_mnist --config.data.source=/nowhere --config.data.folder=/nowhere2',
  '--config.data.name=noise',
  '--config.data.name=cifar10 --config.data.folder=/nowhere',
]
FLAGS = [
  '--wordkir=x',
  '--nodry',
  '--dry_run=maybe',
  '--debug=2x',
  '--profile=3',
  '--profile=5:2',
  '--profile=a:b',
  '--profile=1:2:3',
  'adam',
  '-x',
  '--config=nowhere.py',
  '--config=experiments/configs',
  '--config=experiments/configs/digits.py:big',
  '--config=experiments/configs/noise.py:smal',
  '--config=setup.cfg',
  '--config=README.md',
  '--config=',
  '--config.',
  '--config.kfac=1',
  '--config.model=mlp',
  '--config.kfac.damping.x=1',
  '--num_processes=2',
  '--process_id=0',
  '--num_processes=x',
  '--coordinator_address=localhost:1',
  '--num_processes=2 --process_id=1',
  '--coordinator_address=localhost:1 --num_processes=2 --process_id=2',
  '--workdir=/proc/x',
  '--workdir=/dev/null/x',
]
BASE = 'from experiments.configs import digits\ndef get_config():\n  c = digits.get_config()\n'
FILES = {
  'raises': 'raise RuntimeError("no such machine")',
  'does not parse': 'def get_config(:',
  'has no get_config': 'x = 1',
  'returns nothing': 'def get_config():\n  pass',
  'returns an empty config': 'from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()',
  'lacks a section': f'{BASE}  del c.recipe\n  return c',
  'replaces a section': 'from ml_collections import ConfigDict\nfrom experiments.configs import digits\ndef get_config():\n'
  '  c = digits.get_config()\n  c.data = ConfigDict({"name": "digits"})\n  return c',
  'has a word for a section': 'from experiments.configs import digits\ndef get_config():\n  c = digits.get_config()\n'
  '  del c.kfac\n  c.kfac = 3\n  return c',
  'imports what is not there': 'import nothing_of_this_name',
  'is not text': '\0\1\2',
}

COUNTS = {
  'types': WRONG_TYPES,
  'spelling': MISSPELT,
  'ranges': BEYOND,
  'finite': NOT_FINITE,
  'words': WORDS,
  'flags': FLAGS,
}


def argv_of(case):
  return case.split(' ') if isinstance(case, str) else case


def test_there_are_three_hundred():
  """Configs and flags; data files and checkpoints come on top."""
  assert sum(map(len, COUNTS.values())) + len(FILES) >= 300


@pytest.mark.long
@pytest.mark.parametrize('kind', COUNTS)
def test_broken_configs_and_flags(tmp_path, capsys, monkeypatch, kind):
  """The line names the key, the value or the flag that is wrong, and no folder is made."""
  failed = []
  for case in COUNTS[kind]:
    workdir = tmp_path / 'run'
    argv = [*QUICK, f'--workdir={workdir}', *argv_of(case)]
    try:
      line = told(*command(capsys, monkeypatch, argv), allowed=(2,))
      assert not workdir.exists(), 'a folder was made'
      named = [re.split('[=.:/]', a.lstrip('-'))[-1] for a in argv_of(case)] + re.findall(
        r'[\w-]+', ' '.join(argv_of(case))
      )
      assert kind == 'flags' or any(
        word.lower() in line.lower() for word in named if len(word) > 1 or f"'{word}'" in line
      ), line
    except AssertionError as error:
      failed.append((case, str(error)[:400]))
      shutil.rmtree(workdir, ignore_errors=True)
  assert not failed, f'{len(failed)} of {len(COUNTS[kind])}: {failed}'


@pytest.mark.parametrize('name', FILES)
def test_broken_config_files(tmp_path, capsys, monkeypatch, name):
  path = tmp_path / f'{name.replace(" ", "_")}_config.py'  # a module of its own
  path.write_text(FILES[name])
  line = told(*command(capsys, monkeypatch, [f'--config={path}', f'--workdir={tmp_path / "run"}']), allowed=(2,))
  assert not (tmp_path / 'run').exists() and ('config' in line or 'recipe' in line), line


def damaged(path, rng):
  """A file with an accident: shortened, emptied, gone, or with bytes overwritten."""
  data, how = path.read_bytes(), rng.choice(['short', 'empty', 'gone', 'bytes', 'zeros'])
  if how == 'gone':
    path.unlink()
  elif how == 'bytes':
    at = rng.randrange(max(len(data), 1))
    path.write_bytes(data[:at] + rng.randbytes(16) + data[at + 16 :])
  else:
    path.write_bytes({'short': data[: len(data) // 2], 'empty': b'', 'zeros': bytes(len(data))}[how])
  return how


@pytest.mark.long
@pytest.mark.parametrize('seed', range(12))
def test_broken_data_files(tmp_path, capsys, monkeypatch, seed):
  """Of prepared sets and of sources; a file that is not needed may be missed by nobody."""
  rng = random.Random(seed)
  write_idx(tmp_path / 'idx', packed=bool(seed % 2), train=64, test=16)
  argv = [
    *QUICK,
    f'--workdir={tmp_path / "run"}',
    f'--config.data.folder={tmp_path / "data"}',
    '--config.data.name=fashion_mnist',
  ]
  argv += [
    f'--config.data.source={tmp_path / "idx"}',
    '--config.keep_checkpoints=0',
    '--config.data.eval_split=test',
    '--dry_run',
  ]
  if seed % 3:
    assert command(capsys, monkeypatch, argv)[0] == 0  # which prepares the set
  files = sorted(p for p in (tmp_path / ('data' if seed % 3 else 'idx')).rglob('*') if p.is_file())
  path = rng.choice([p for p in files if p.suffix != '.lock'])  # whether a lock file is there says nothing
  how = damaged(path, rng)
  code, err = command(capsys, monkeypatch, argv)
  if code == 0:  # labels and pixels of other values, or what only describes the set
    assert how == 'bytes' or any(word in path.name for word in ('info', 'features', 'origin')), (path, how)
  else:
    line = told(code, err, allowed=(2,))
    assert 'fashion_mnist' in line, line
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A finished run of three steps with one checkpoint, and the losses of six."""
  folder = tmp_path_factory.mktemp('saved')
  config = small('sgd', 'data=8', steps=3)
  config.writers.tensorboard = False
  train(config, folder / 'run', quiet=True)
  config.steps = 6
  shutil.copytree(folder / 'run', folder / 'whole')
  train(config, folder / 'whole', quiet=True)
  return folder, config


@pytest.mark.long
@pytest.mark.parametrize('seed', range(40))
def test_broken_checkpoints(tmp_path, capsys, monkeypatch, saved, seed):
  """Any file of a run's folder damaged: the run ends in one line and can be repaired, or goes on exactly."""
  source, _ = saved
  rng = random.Random(seed)
  workdir = tmp_path / 'run'
  shutil.copytree(source / 'run', workdir)
  files = sorted(p for p in workdir.rglob('*') if p.is_file() and 'checkpoints' in p.parts)
  others = [workdir / name for name in ('config.json', 'metrics.jsonl', 'layers.jsonl', 'about.json', 'report.html')]
  path = rng.choice(files if seed % 4 else others)
  how = damaged(path, rng)
  argv = [f'--config={CONFIG}', f'--workdir={workdir}', '--config.model.widths=(16,8)', '--config.data.batch_size=64']
  argv += [
    '--config.optimizer=sgd',
    '--config.mesh=data=8',
    '--config.eval_every=3',
    '--config.writers.tensorboard=False',
  ]
  argv += ['--config.kfac.inverses_every=2', '--config.kfac.damping=0.01', '--config.steps=6']
  before = {p: p.read_bytes() for p in files if p.exists()}
  code, err = command(capsys, monkeypatch, argv)
  if code == 0:
    whole = losses(source / 'whole')
    assert losses(workdir)[-3:] == whole[-3:], (path, how)
  else:
    line = told(code, err)
    assert 'checkpoint' in line or 'config.json' in line, line
    assert all(p.read_bytes() == data for p, data in before.items()), 'a checkpoint was changed'


REAL = [*random.Random(1).sample(WRONG_TYPES + MISSPELT + NOT_FINITE, 6), *random.Random(2).sample(WORDS, 6)]
REAL += random.Random(3).sample([f for f in FLAGS if 'process' not in f], 8)


@pytest.mark.long
def test_twenty_as_real_commands(tmp_path):
  assert len(REAL) == 20
  failed = []
  for case in REAL:
    done = commands.run('experiments/train.py', *QUICK, f'--workdir={tmp_path / "run"}', *argv_of(case))
    try:
      told(done.returncode, done.stderr, allowed=(2,))
      assert not (tmp_path / 'run').exists()
    except AssertionError as error:
      failed.append((case, str(error)[:300]))
  assert not failed, failed


def test_debug_shows_the_way(tmp_path):
  argv = [*QUICK, f'--workdir={tmp_path / "run"}', '--config.mesh=data=3', '--debug']
  done = commands.run('experiments/train.py', *argv)
  assert done.returncode == 2 and 'Traceback' in done.stderr and 'error: ' in done.stderr


def test_a_bug_ends_in_one_line_too(capsys, monkeypatch):
  commands.stay(monkeypatch)

  def buggy(argv):
    raise ZeroDivisionError('a bug')

  with pytest.raises(SystemExit) as ended:
    launch.guarded(buggy)(['train.py'])
  line = told(ended.value.code, capsys.readouterr().err, allowed=(3,))
  assert re.fullmatch(r'error: ZeroDivisionError: a bug \(at test_broken.py:\d+; --debug prints the traceback\)', line)
