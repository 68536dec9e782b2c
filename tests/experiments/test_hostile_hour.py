"""What a hostile user found in an hour: code in prepared sets, paths, disks that are full for a moment, jobs that meet."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.configs import digits
from kronmesh import data, files
from kronmesh.commands import sweep as sweep_command
from kronmesh.data.features import check_features
from kronmesh.train import checkpoints
from kronmesh.train.build import build
from kronmesh.train.checkpoints import exported_step, load_export
from kronmesh.train.errors import ConfigError, Preempted
from kronmesh.train.loop import train
from kronmesh.train.reporting import writers
from kronmesh.train.runtime import launch, processes
from kronmesh.train.runtime.workdir import check_contents, check_free, claimed
from kronmesh.train.sweeps import sweep
from kronmesh.train.sweeps import trials as search
from kronmesh.train.sweeps.comparison import Member
from tests.experiments.small import small

ROOT = Path(__file__).parents[2]


def calm(steps=3, **changes):
  config = small('sgd', 'data=8', steps)
  config.sgd.learning_rate = 1e-3
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
  """A finished run, to be copied."""
  folder = tmp_path_factory.mktemp('ended')
  train(calm(), folder, quiet=True)
  return folder


@pytest.fixture
def run(ended, tmp_path):
  return shutil.copytree(ended, tmp_path / 'run')


# Code and paths


@pytest.mark.parametrize('name', ['sets.mine.Label', 'os.path', 'tensorflow_datasets.core.featuresx.A'])
def test_a_prepared_set_that_names_code_of_its_own_is_refused(tmp_path, name):
  own = {'featuresDict': {'features': {'label': {'pythonClassName': name}}}}
  own['pythonClassName'] = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'
  (tmp_path / 'mine/1.0.0').mkdir(parents=True)
  (tmp_path / 'mine/1.0.0/features.json').write_text(json.dumps(own))
  with pytest.raises(data.DataError, match=f"names '{name}', code that is not of TFDS"):
    data.record_source('mine', 'train', folder=str(tmp_path))


def test_a_prepared_set_of_tfds_features_is_not(tmp_path):
  data.load_arrays('digits', 'train', folder=str(tmp_path))
  assert list(tmp_path.rglob('features.json'))
  check_features(tmp_path / 'digits')


def test_a_backslash_in_the_path_is_refused(tmp_path, monkeypatch):
  """The library that writes arrays would put them elsewhere."""
  assert not launch._is_folder('run\\1') and launch._is_folder('run 1')
  (tmp_path / 'a\\b').mkdir()
  monkeypatch.chdir(tmp_path / 'a\\b')
  assert not launch._is_folder('run')
  with pytest.raises(ConfigError, match='has a backslash in its path'):
    train(calm(), tmp_path / 'run\\1', quiet=True)
  with pytest.raises(ConfigError, match='has a backslash in its path'):
    load_export(tmp_path / 'a\\b')


# Disks and terminals


def test_tensorboard_is_given_up_when_its_thread_has_ended(tmp_path, monkeypatch):
  """As at a disk that is full for a moment: its queue would wait for a thread that is gone."""
  config = calm()
  with writers.Writers(config, tmp_path, 0, True) as own:
    thread = writers._thread(own.board)
    monkeypatch.setattr(thread, '_record_writer', None)  # what it writes with: the thread ends
    for step in range(50):
      done = threading.Event()
      threading.Thread(
        target=lambda step=step, done=done: (own.row('eval', {'step': step, 'x': 1.0}), done.set())
      ).start()
      assert done.wait(20), 'a row waits for the thread'
      if step == 3:
        thread.join(20)
    assert own.board is None


@pytest.mark.long
@pytest.mark.parametrize('closed', ['>&-', '2>&-'])
def test_a_run_without_a_terminal(tmp_path, closed):
  settings = '--config.steps=2 --config.devices=1 --config.mesh=data=1 --config.optimizer=sgd --config.eval_every=2'
  command = f'{sys.executable} experiments/train.py {settings} --workdir={tmp_path}/run {closed}'
  assert subprocess.run(command, shell=True, cwd=ROOT, timeout=300).returncode == 0
  assert exported_step(tmp_path / 'run') == 2


def test_writing_to_one_of_two_names_of_a_file_leaves_the_other(tmp_path):
  (tmp_path / 'a').write_text('one\n')
  os.link(tmp_path / 'a', tmp_path / 'b')
  files.append_lines(tmp_path / 'b', ['two'])
  assert (tmp_path / 'a').read_text() == 'one\n' and (tmp_path / 'b').read_text() == 'one\ntwo\n'
  (tmp_path / 'precious').write_text('gold')
  (tmp_path / 'run').mkdir()
  os.link(tmp_path / 'precious', tmp_path / 'run/.lock')
  with claimed(tmp_path / 'run'):
    pass
  assert (tmp_path / 'precious').read_text() == 'gold'


def test_rows_are_not_written_to_a_pipe(tmp_path):
  os.mkfifo(tmp_path / 'rows')
  with pytest.raises(OSError):
    files.append_lines(tmp_path / 'rows', ['{}'])
  files.sync_file(tmp_path / 'rows')


def test_the_lock_of_prepared_data_leads_nowhere(tmp_path):
  (tmp_path / 'digits').mkdir()
  (tmp_path / 'precious').write_text('gold')
  (tmp_path / 'digits/1.0.0.lock').symlink_to(tmp_path / 'precious')
  with pytest.raises(data.DataError, match='cannot be written'):
    data.load_arrays('digits', 'train', folder=str(tmp_path))
  (tmp_path / 'digits/1.0.0.lock').unlink()
  os.mkfifo(tmp_path / 'digits/1.0.0.lock')
  with pytest.raises(data.DataError, match='not a regular file'):
    data.load_arrays('digits', 'train', folder=str(tmp_path))
  assert (tmp_path / 'precious').read_text() == 'gold'


@pytest.mark.parametrize('name', ['members', 'logs', 'submitit'])
def test_links_of_a_sweep_are_refused(tmp_path, name):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / name).symlink_to(tmp_path)
  with pytest.raises(ConfigError, match='is a link, through which a run does not write'):
    check_contents(tmp_path / 'run')


# Checkpoints and exports


@pytest.mark.long
def test_a_checkpoint_under_another_number_is_set_aside(run):
  shutil.copytree(run / 'checkpoints/3', run / 'checkpoints/1000')
  train(calm(6), run, quiet=True)
  assert [p.name for p in (run / 'unreadable').iterdir()] == ['1000.0'] and exported_step(run) == 6
  words = (run / 'events.jsonl').read_text()
  assert 'it is of step 3, and its folder is called 1000' in words and 'from the checkpoint of step 3' in words


def test_values_of_another_width_are_named(run):
  jax.config.update('jax_enable_x64', True)
  try:
    with pytest.raises(ConfigError, match='was saved with JAX_ENABLE_X64=0; set that'):
      train(calm(6), run, quiet=True)
  finally:
    jax.config.update('jax_enable_x64', False)


def test_an_export_with_other_values_is_refused(run, monkeypatch):
  load_export(run / 'export')
  wrong = lambda variables: {**kept(variables), 'params/decoder_0/bias': 1}  # noqa: E731
  kept = checkpoints._digests
  monkeypatch.setattr(checkpoints, '_digests', wrong)
  with pytest.raises(ConfigError, match="the values of 'params/decoder_0/bias' are not those that were exported"):
    load_export(run / 'export')


def test_digests_change_with_any_bit():
  x = {'a': np.arange(6, dtype=np.float32), 'b': np.zeros((), np.int32)}
  y = {**x, 'a': x['a'].copy()}
  y['a'].view(np.uint32)[3] ^= 1
  assert checkpoints._digests(x)['a'] != checkpoints._digests(y)['a']
  assert checkpoints._digests(x)['b'] == checkpoints._digests(y)['b']


@pytest.mark.parametrize('where', ['export', 'checkpoints/3'])
def test_a_description_of_gigabytes_is_not_read(run, where):
  path = next((run / where).rglob('_METADATA'))
  os.truncate(path, 6 * 2**30)  # of which the disk holds nothing
  if where == 'export':
    with pytest.raises(ConfigError, match=r'has 6\.44 GB, more than such a file ever has'):
      load_export(run / 'export')
  else:
    with pytest.raises(ConfigError, match=r'has 6\.44 GB'):
      train(calm(6), run, quiet=True)


@pytest.mark.parametrize('text', ['[', '[]', '{"step": 3}'])
def test_an_export_that_says_nonsense_of_itself(run, text):
  path = next(p for p in (run / 'export/about').iterdir() if p.is_file())
  path.write_text(text)
  with pytest.raises(ConfigError, match='cannot be read as an export'):
    load_export(run / 'export')


# Jobs and sweeps


def test_a_port_that_another_job_has_is_refused():
  with socket.socket() as other:
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    other.bind(('127.0.0.1', 0))
    other.listen()
    address = f'127.0.0.1:{other.getsockname()[1]}'
    with pytest.raises(ConfigError, match=f'{address} is in use, perhaps by another job'):
      processes._binding({'coordinator_address': address, 'process_id': 0})
  assert processes._binding({'coordinator_address': address, 'process_id': 0}) == {'coordinator_bind_address': address}


def test_a_folder_in_use_is_refused_before_processes_join(tmp_path):
  check_free(tmp_path)
  with claimed(tmp_path), pytest.raises(ConfigError, match='is in use by another run'):
    check_free(tmp_path)
  check_free(tmp_path)


def test_a_sweep_that_is_told_to_stop_ends_as_a_run_does():
  with pytest.raises(Preempted):
    sweep_command._interrupt(signal.SIGTERM, None)
  with pytest.raises(KeyboardInterrupt):
    sweep_command._interrupt(signal.SIGINT, None)


def test_a_member_that_begins_while_the_sweep_is_told_to_stop_is_told_too(tmp_path, monkeypatch):
  """The signal comes while the member is being marked, before its process is there."""
  config = calm()
  members = [Member(f'seed={k}', {'seed': k}, str(tmp_path / f'members/seed={k}')) for k in range(2)]
  own = sweep.Sweep(config, tmp_path, members)
  sleeps = [sys.executable, '-c', 'import time; time.sleep(120)']
  monkeypatch.setattr(sweep, 'member_command', lambda member, config: sleeps)
  begun = threading.Event()

  def mark(member, state, words=''):
    begun.set()
    if state == 'runs':
      stopped.wait(20)

  class Future:
    def result(self):
      begun.wait(20)
      threading.Timer(0.5, stopped.set).start()
      raise Preempted('told to stop')

  stopped, submit = threading.Event(), sweep.concurrent.futures.ThreadPoolExecutor.submit

  def submitted(pool, fn, *args):
    submit(pool, fn, *args)
    return Future()

  monkeypatch.setattr(own, 'mark', mark)
  monkeypatch.setattr(sweep.concurrent.futures.ThreadPoolExecutor, 'submit', submitted)
  with pytest.raises(Preempted):
    sweep.run_here(own, 1, [])


def test_a_member_that_is_done_and_gone_is_trained_again(tmp_path, ended):
  members = [Member(f'seed={k}', {'seed': k}, str(tmp_path / f'members/seed={k}')) for k in range(2)]
  for member in members:
    shutil.copytree(ended, member.workdir)
  own = sweep.Sweep(calm(), tmp_path, members)
  for member in members:
    own.mark(member, 'done')
  shutil.rmtree(members[1].workdir)
  again = sweep.Sweep(calm(), tmp_path, members)
  assert [m.name for m in again.waiting()] == ['seed=1']


def test_members_of_other_data_are_told(tmp_path, ended):
  members = [Member(f'seed={k}', {'seed': k}, str(tmp_path / f'seed={k}')) for k in range(2)]
  for member in members:
    shutil.copytree(ended, member.workdir)
  assert sweep.other_data(members) == ''
  path = Path(members[1].workdir) / 'data.json'
  known = json.loads(path.read_text())
  path.write_text(json.dumps({**known, 'train: contents': 'another'}))
  assert sweep.other_data(members) == 'seed=1 was trained on other data than seed=0: train: contents is another'


def test_trials_of_other_data_are_not_believed(tmp_path):
  def arrays(shift):
    images = np.arange(32, dtype=np.float32).reshape(8, 2, 2, 1) + shift
    for split in ('train', 'test'):
      np.savez(tmp_path / f'{split}.npz', image=images, label=np.arange(8) % 2)

  config = digits.get_config()
  config.data.update({'name': 'arrays', 'source': str(tmp_path), 'batch_size': 8})
  config.mesh = 'data=8'
  arrays(0)
  first = search.fingerprint(config)
  assert search.fingerprint(config) == first
  arrays(1)
  assert search.fingerprint(config) != first


def test_a_row_of_trials_without_a_curve_is_passed_over(tmp_path, capsys):
  row = {'trial': {}, 'config': 'x', 'final': 1.0}
  rows = [{**row, 'curve': None}, {**row, 'curve': [[1, 2.0]]}]
  (tmp_path / 'trials.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  assert len(search.logged_trials(tmp_path / 'trials.jsonl', 'x')) == 1
  assert '1 lines cannot be read' in capsys.readouterr().err


def test_a_run_is_built_once(run):
  """That what `ended` is copied from is whole."""
  assert build(calm()).task.target == 'error' and exported_step(run) == 3
