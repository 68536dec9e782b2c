"""Runs that are broken on purpose: what was saved stays, nothing hangs, nothing is written outside of the work folder."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kronmesh import data
from kronmesh.commands import compare
from kronmesh.train import checkpoints, jsonfile
from kronmesh.train import loop as trainer
from kronmesh.train.build import build
from kronmesh.train.checkpoints import exported_step, load_export
from kronmesh.train.errors import ConfigError, Diverged, Preempted, RunError, Stopped, StorageError
from kronmesh.train.loop import train
from kronmesh.train.reporting.report import write_report
from kronmesh.train.runtime import processes
from kronmesh.train.runtime.watchdog import Mark, Watchdog, _who_hangs
from kronmesh.train.runtime.workdir import claimed
from kronmesh.train.sweeps import trials as search
from tests import commands
from tests.experiments.small import built, losses, rows, small

ROOT = Path(__file__).parents[2]


# Lost


@pytest.mark.long
def test_an_export_knows_its_step(tmp_path, monkeypatch):
  config = small('sgd', steps=3)
  train(config, tmp_path, quiet=True)
  config.steps = 6

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(trainer, 'export', killed)
    train(config, tmp_path, quiet=True)
  assert exported_step(tmp_path) == 3
  train(config, tmp_path, quiet=True)
  assert exported_step(tmp_path) == 6 and load_export(tmp_path / 'export')[1]['step'] == 6


def raises(error):
  def train(*_, **__):
    raise error

  return train


@pytest.mark.parametrize('error', [StorageError('cannot write'), Preempted('told to stop'), RunError('another')])
def test_what_says_nothing_of_a_setting_is_not_recorded(tmp_path, monkeypatch, error):
  config = small('sgd', steps=3)
  monkeypatch.setattr(search, 'train', raises(error))
  with pytest.raises(type(error)):
    search.try_all(config, [{'optimizer': 'sgd'}], tmp_path / 'trials.jsonl', 0)
  assert not (tmp_path / 'trials.jsonl').exists()
  monkeypatch.setattr(compare, 'train', raises(error))
  monkeypatch.setattr(compare, 'warm_up', lambda run: None)
  with pytest.raises(type(error)):
    compare.compare(config, tmp_path, ['sgd'], 2)


def test_a_stop_within_a_trial_asks_to_be_called_again(tmp_path, monkeypatch):
  monkeypatch.setattr(search, 'train', raises(Stopped('told to stop; nothing is saved')))
  with pytest.raises(Preempted):
    search.try_all(small('sgd', steps=3), [{'optimizer': 'sgd'}], tmp_path / 'trials.jsonl', 0)
  assert not (tmp_path / 'trials.jsonl').exists()


def test_a_run_that_diverges_is_recorded(tmp_path, monkeypatch):
  monkeypatch.setattr(search, 'train', raises(Diverged('the loss is nan')))
  (row,) = search.try_all(small('sgd', steps=3), [{'optimizer': 'sgd'}], tmp_path / 'trials.jsonl', 0)
  assert row['final'] is None and len(jsonfile.read_lines(tmp_path / 'trials.jsonl').rows) == 1


def test_half_a_line_blocks_no_folder(tmp_path, monkeypatch, capsys):
  log, config, trials = (
    tmp_path / 'trials.jsonl',
    small('sgd', steps=3),
    [{'optimizer': 'sgd', 'seed': s} for s in (0, 1)],
  )
  attempts = []

  def attempt(config, trial, seed):
    attempts.append(trial['seed'])
    return {'curve': [[3, 0.5]], 'final': 0.5}

  monkeypatch.setattr(search, 'attempt', attempt)
  search.try_all(config, trials, log, 0)
  text = log.read_bytes()
  for damaged in (text[:-9], text.replace(b'curve', b'cu\xffve', 1), text + b'[1]\n'):
    attempts.clear()
    log.write_bytes(damaged)
    search.try_all(config, trials, log, 0)
    assert len(attempts) == (0 if damaged.endswith(b'[1]\n') else 1)
    assert len([r for r in jsonfile.read_lines(log).rows if 'trial' in r]) == 2
  assert 'lines cannot be read; their trials are run again' in capsys.readouterr().err


# Hang


def mounted(disk, options):
  disk.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', disk], capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')


def command(workdir, *more):
  return [
    sys.executable, 'experiments/train.py', '--config=experiments/configs/digits_classifier.py', '--config.devices=1',
    '--config.mesh=data=1', '--config.optimizer=sgd', '--config.data.batch_size=64', '--config.checkpoint_every=5',
    '--config.log_every=5', '--config.steps=40', f'--workdir={workdir}', *more,
  ]  # fmt: skip


@pytest.mark.long('size=300k')
@pytest.mark.parametrize('options', [pytest.param('size=50m,nr_inodes=12', marks=pytest.mark.long), 'size=300k'])
def test_a_disk_that_takes_no_checkpoint_ends_the_run_in_one_line_within_seconds(tmp_path, options):
  disk = tmp_path / 'disk'
  mounted(disk, options)
  try:
    done = commands.run(*command(disk / 'run')[1:])
    left = [p.name for p in (disk / 'run/checkpoints').iterdir() if not p.name.isdigit()]
  finally:
    subprocess.run(['umount', '-l', disk], check=True)
  told = [line for line in done.stderr.splitlines() if not line.startswith('sgd on digits')]
  assert done.returncode == 3 and len(told) == 1 and 'No space left on device' in told[0], done.stderr
  assert not left


def test_a_pipe_is_no_data(tmp_path):
  os.mkfifo(tmp_path / 'train.npz')
  with pytest.raises(data.DataError, match=r'train.npz cannot be read: it is not a regular file'):
    data.load_arrays('arrays', 'train', source=str(tmp_path))


def test_who_hangs_is_named():
  mark = lambda step, words: Mark(1, step, words, 'arrays.py:59')  # noqa: E731
  assert _who_hangs({0: mark(0, 'waits'), 1: mark(0, 'hangs')}) == 'process 1 hangs at arrays.py:59'
  assert _who_hangs({0: mark(4, 'trains'), 1: mark(3, 'trains')}) == 'process 1 hangs, it has not come to step 4'
  assert _who_hangs({0: mark(4, 'trains'), 1: mark(4, 'trains')}) == 'all processes wait in the same step'


@pytest.fixture
def two_processes(tmp_path, monkeypatch):
  """A watchdog of process 0 of two, whose pulses are steps of this test, and how it ended."""
  ended = []

  def stop(words, code):
    ended.append(words)
    raise SystemExit(code)

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, 'several', lambda: True)
  monkeypatch.setattr(processes, 'stop', stop)
  watchdog = Watchdog(5.0, tmp_path)
  watchdog._linger = lambda: None
  return watchdog, ended


def pulses(watchdog, count, other=None):
  """So many pulses of this process; `other` writes the mark of process 1 before each."""
  waits = iter([False] * count)

  class Done:
    def wait(self, seconds):
      if other is not None:
        other()
      return next(waits, True)

  watchdog.done = Done()
  watchdog._watch()


def mark_of_1(tmp_path, words, moves=True):
  state = {'pulse': 0}

  def write():
    state['pulse'] += moves
    (tmp_path / '1').write_text(f'{state["pulse"]}\n0\nplace.py:1\n{words}')

  return write


def test_a_hang_while_starting_is_noticed(tmp_path, two_processes, monkeypatch):
  watchdog, ended = two_processes
  monkeypatch.setattr(watchdog, '_doing', lambda: ('waits', ''))
  with pytest.raises(SystemExit):
    pulses(watchdog, 10, mark_of_1(tmp_path, 'hangs'))
  assert ended == ['process 1 hangs at place.py:1; nothing done for 5 seconds (see config.watchdog_seconds)']


@pytest.mark.parametrize('words', ['starts', 'compiles'])
def test_work_is_no_hang(tmp_path, two_processes, monkeypatch, words):
  watchdog, ended = two_processes
  monkeypatch.setattr(watchdog, '_doing', lambda: ('waits', ''))
  pulses(watchdog, 60, mark_of_1(tmp_path, words))
  assert not ended


@pytest.mark.parametrize('words, count', [('trains', 25), ('compiles', 205)])
def test_a_frozen_process_is_noticed_by_pulses_and_not_by_clocks(tmp_path, two_processes, monkeypatch, words, count):
  watchdog, ended = two_processes
  watchdog.seconds = 0.0
  monkeypatch.setattr(watchdog, '_doing', lambda: ('trains', ''))
  write = mark_of_1(tmp_path, words)

  def old():  # a clock that has jumped by a day
    write()
    os.utime(tmp_path / '1', (1, 1))

  pulses(watchdog, 60, old)
  assert not ended
  pulses(watchdog, count - 6, mark_of_1(tmp_path, words, moves=False))
  assert not ended
  with pytest.raises(SystemExit):
    pulses(watchdog, 12, None)
  assert 'process 1 gives no sign' in ended[0]


# Wrong in silence


def test_a_loss_that_grows_and_stays_finite_is_told(tmp_path, capsys):
  config = small('sgd', steps=6)
  config.sgd.learning_rate, config.log_every = 1e5, 1
  train(config, tmp_path)
  told = [json.loads(line) for line in (tmp_path / 'events.jsonl').read_text().splitlines()]
  assert [row['kind'] for row in told] == ['warning'] and 'the run diverges' in told[0]['words']
  assert 'the run diverges' in capsys.readouterr().err


@pytest.mark.long
def test_a_bad_byte_among_the_rows_is_told(tmp_path):
  config = small('sgd', steps=6)
  config.checkpoint_every = 3
  train(config, tmp_path, quiet=True)
  log = tmp_path / 'metrics.jsonl'
  log.write_bytes(log.read_bytes().replace(b'"step": 2', b'"ste\xff": 2', 1))
  config.steps = 8
  train(config, tmp_path, quiet=True)
  words = [json.loads(line)['words'] for line in (tmp_path / 'events.jsonl').read_text().splitlines()]
  assert '1 lines of metrics.jsonl cannot be read, and are lost' in words


@pytest.mark.brief('another')
@pytest.mark.parametrize('how', ['moved', 'removed', 'another'])
def test_a_folder_that_is_no_longer_there_ends_the_run(tmp_path, how):
  """As after a disk is unmounted, which leaves an empty folder of the same name."""
  config, workdir = small('sgd', steps=40), tmp_path / 'run'
  config.log_every, config.checkpoint_every = 5, 5
  run = build(config)

  def step(state, batch, number):
    if number == 12:
      shutil.move(workdir, tmp_path / 'gone')
      if how == 'removed':
        shutil.rmtree(tmp_path / 'gone')
      if how == 'another':
        workdir.mkdir()
    return run.step(state, batch, number)

  with pytest.raises(StorageError, match=r'is no longer the folder in which this run began'):
    train(config, workdir, quiet=True, run=run._replace(step=step))
  assert not list(workdir.glob('*.jsonl')) and not (workdir / 'report.html').exists()
  if how == 'moved':
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.move(tmp_path / 'gone', workdir)
    train(config, workdir, quiet=True, run=run)
    train(config, tmp_path / 'whole', quiet=True, run=run)
    assert losses(workdir) == losses(tmp_path / 'whole')


@pytest.mark.long
def test_other_data_under_the_same_name_are_refused(tmp_path):
  config = small('sgd', steps=3)
  config.data.name, config.data.source, config.data.eval_split = 'arrays', str(tmp_path), 'test'
  config.data.batch_size = config.data.eval_batch_size = 8

  def write(seed):
    rng = np.random.default_rng(seed)
    for split in ('train', 'test'):
      data.write_arrays(data.Arrays(rng.random((16, 8, 8, 1), np.float32), np.zeros(16, np.int32)), tmp_path / split)

  write(0)
  train(config, tmp_path / 'run', quiet=True)
  config.steps = 6
  train(config, tmp_path / 'run', quiet=True)
  write(1)
  config.steps = 9
  with pytest.raises(
    ConfigError, match=r'holds a run on other data: (train|test): contents was .+ bring those data back'
  ):
    train(config, tmp_path / 'run', quiet=True)


# From strangers

LINKED = ('config.json', 'data.json', 'metrics.jsonl', 'events.jsonl', 'report.html', 'coverage.txt', '.lock')


@pytest.mark.parametrize('name', [*LINKED, 'samples', 'tensorboard', 'checkpoints', 'export', 'logs/x.log'])
def test_no_file_is_written_through_a_link(tmp_path, name):
  victim, workdir = tmp_path / 'victim', tmp_path / 'run'
  workdir.mkdir()
  if '.' in name:
    victim.write_text('precious')
  else:
    victim.mkdir()
  (workdir / name).parent.mkdir(exist_ok=True)
  (workdir / name).symlink_to(victim)
  with pytest.raises(ConfigError, match=rf'{name} is a link, through which a run does not write'):
    train(small('sgd', steps=3), workdir, quiet=True)
  assert victim.read_text() == 'precious' if '.' in name else not list(victim.iterdir())


@pytest.mark.long
def test_names_that_were_guessed_are_not_followed(tmp_path):
  """The names under which files used to be made before they are renamed."""
  victim, workdir = tmp_path / 'victim', tmp_path / 'run'
  victim.write_text('precious')
  workdir.mkdir()
  for name in ('config.json.new', 'metrics.jsonl.new', 'coverage.txt.new', 'report.html.new'):
    (workdir / name).symlink_to(victim)
  config = small('kfac', 'data=1', steps=3)
  train(config, workdir, quiet=True, run=built(config))
  assert victim.read_text() == 'precious'


def test_a_linked_work_folder_is_the_users_own_choice(tmp_path):
  (tmp_path / 'disk').mkdir()
  (tmp_path / 'run').symlink_to(tmp_path / 'disk')
  train(small('sgd', steps=3), tmp_path / 'run', quiet=True)
  assert losses(tmp_path / 'disk')


# Words and codes


def test_a_file_system_without_locks_is_not_called_in_use(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with pytest.raises(ConfigError, match=r'the file system of .+ has no locks \(No locks available\)'):
    train(small('sgd', steps=3), tmp_path, quiet=True)


@pytest.mark.long
def test_a_folder_that_another_run_has_is_waited_for(tmp_path):
  hold = f'import fcntl, time; f = open({str(tmp_path / ".lock")!r}, "w"); fcntl.flock(f, 2); print(1, flush=True)'
  holder = subprocess.Popen([sys.executable, '-c', f'{hold}; time.sleep(2)'], stdout=subprocess.PIPE)
  holder.stdout.readline()
  with pytest.raises(ConfigError, match='is in use by another run'), claimed(tmp_path):
    pass
  start = time.monotonic()
  with claimed(tmp_path, patience=60):
    assert time.monotonic() - start < 30
  holder.wait()


def test_a_config_that_is_deleted_meanwhile_does_not_end_a_good_run(tmp_path):
  config = small('sgd', steps=6)
  run = build(config)

  def step(state, batch, number):
    (tmp_path / 'config.json').unlink(missing_ok=True)
    return run.step(state, batch, number)

  assert len(train(config, tmp_path, quiet=True, run=run._replace(step=step))) == 2
  assert 'report.html cannot be made' in (tmp_path / 'events.jsonl').read_text()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  config = small('kfac', 'data=1', steps=6)
  train(config, workdir, quiet=True, run=built(config))
  return workdir


JUNK = (None, 'x', [], {}, [1], {'a': 1}, True, 1e400, -1, 10**30, '<i id=x>', float('nan'), '9' * 400, {'layers': {}})


def damaged(value, rng):
  if not isinstance(value, dict):
    return value
  return {
    k: rng.choice(JUNK) if rng.random() < 0.15 else damaged(v, rng) for k, v in value.items() if rng.random() > 0.05
  }


@pytest.mark.long('0', '1')
@pytest.mark.parametrize('seed', range(40))
def test_a_page_is_made_of_damaged_rows_or_refused(tmp_path, finished, seed):
  rng = random.Random(seed)
  for name in ('config.json', 'about.json', 'metrics.jsonl', 'layers.jsonl', 'coverage.txt'):
    text = (finished / name).read_bytes()
    if rng.random() < 0.3:
      raw = bytearray(text)
      for _ in range(rng.randint(1, 30)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
      text = bytes(raw)
    elif name.endswith('jsonl'):
      text = b''.join(json.dumps(damaged(json.loads(line), rng)).encode() + b'\n' for line in text.splitlines())
    elif name.endswith('json'):
      text = json.dumps(damaged(json.loads(text), rng)).encode()
    (tmp_path / name).write_bytes(text)
  try:
    page = write_report(tmp_path).read_text()
  except ConfigError as error:
    assert 'config.json cannot be read' in str(error)
  else:
    assert '<i id=x>' not in page


@pytest.mark.long
def test_pages_are_made_of_at_most_as_many_points_as_can_be_seen(tmp_path, finished):
  """The page of 20,000 rows is about as large as the page of 2,000."""
  for name in ('config.json', 'about.json'):
    shutil.copy(finished / name, tmp_path / name)
  row = next(r for r in rows(finished) if 'loss' in r)
  layers = json.loads((finished / 'layers.jsonl').read_text().splitlines()[0])
  sizes = []
  for count in (2000, 20_000):
    for name, one in (('metrics', row), ('layers', layers)):
      lines = (json.dumps({**one, 'step': step}) for step in range(1, count + 1))
      (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    sizes.append(write_report(tmp_path).stat().st_size)
  assert sizes[1] < 1.3 * sizes[0]


def test_a_checkpoint_folder_is_left_without_unfinished_saves(tmp_path):
  unfinished = tmp_path / 'checkpoints/7.orbax-checkpoint-tmp'
  with pytest.raises(RuntimeError), checkpoints.open_checkpoints(tmp_path):
    unfinished.mkdir(parents=True)
    raise RuntimeError('a save failed')
  assert not unfinished.exists()
