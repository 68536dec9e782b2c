"""Runs that were cut off go on as if they had not been; what is in a folder is whole, whoever wrote it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kronmesh.train import checkpoints
from kronmesh.train.beginning import new_state
from kronmesh.train.build import build
from kronmesh.train.checkpoints import load_export, open_checkpoints, restore
from kronmesh.train.errors import ConfigError, Preempted, RunError
from kronmesh.train.loop import train
from kronmesh.train.runtime.workdir import as_json, changes, storage_errors
from tests.experiments.small import build_on, losses, rows, small, steps_of

ROOT = Path(__file__).parents[2]


def cut(run, at):
  """The run that is killed before its step number `at`, as far as a process can be without its own end."""

  def step(state, batch, number):
    if number == at:
      raise KeyboardInterrupt
    return run.step(state, batch, number)

  return run._replace(step=step)


def parts_of(config, workdir, *cuts, run=None):
  run = run or build(config)
  for at in cuts:
    with pytest.raises(KeyboardInterrupt):
      train(config, workdir, quiet=True, run=cut(run, at))
  return train(config, workdir, quiet=True, run=run)


VARIANTS = {
  'kfac': {},
  'sgd, averaged, in microbatches': {'optimizer': 'sgd', 'recipe.average': 0.9, 'microbatches': 2},
  'running mixup': {'recipe.mixup': 0.4, 'recipe.running_mixup': True},
  'float16': {'model.dtype': 'float16', 'recipe.loss_scale': 2.0**15},
}


@pytest.mark.long('kfac')
@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.long] * (n != 'kfac')) for n in VARIANTS])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, name):
  """Bit for bit: losses, and all of the state. Cut off between checkpoints, at one, and before the first."""
  config = classifier() if 'mixup' in name else small(steps=12)
  config.steps, config.checkpoint_every, config.log_every = 12, 4, 5
  with config.unlocked():
    config.update_from_flattened_dict(VARIANTS[name])
  run = build(config)
  train(config, tmp_path / 'whole', quiet=True, run=run)
  parts_of(config, tmp_path / 'parts', 2, 7, 8, 11)
  assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole')
  assert steps_of(tmp_path / 'parts') == list(range(1, 13))
  states = []
  for part in ('parts', 'whole'):
    with open_checkpoints(tmp_path / part) as found:
      states.append(restore(run, found, new_state).state)
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    a, b = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
    np.testing.assert_array_equal(a, b)


def classifier():
  from experiments.configs import digits_classifier

  config = digits_classifier.get_config()
  config.model.hidden, config.data.batch_size = (8,), 64
  return config


@pytest.mark.long
def test_another_mesh_goes_on_with_the_same_data(tmp_path):
  """8, 4, 2 and 1 devices one after the other: the same batches, and losses within 1e-5."""
  config = small(mesh='data=8', steps=20)
  config.checkpoint_every = config.eval_every = 5
  whole, seen = build(config), []
  train(config, tmp_path / 'whole', quiet=True, run=whole)
  for devices, mesh, until in (
    (8, 'data=4,model=2', 5),
    (4, 'data=2,model=2', 10),
    (2, 'data=2', 15),
    (1, 'data=1', 20),
  ):
    config.mesh = mesh
    run = build_on(config, jax.devices()[:devices])

    def step(state, batch, number, run=run):
      seen.append(np.asarray(batch['inputs']))
      return run.step(state, batch, number)

    if until < 20:
      with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / 'parts', quiet=True, run=cut(run._replace(step=step), until))
    else:
      train(config, tmp_path / 'parts', quiet=True, run=run._replace(step=step))
  for found, batch in zip(seen, whole.train_batches(config.seed, 0), strict=False):
    np.testing.assert_array_equal(found, batch['inputs'])
  assert len(seen) == 20
  np.testing.assert_allclose(losses(tmp_path / 'parts'), losses(tmp_path / 'whole'), rtol=1e-5)


def test_checkpoints_are_kept_by_age_and_by_metric(tmp_path):
  config = small('sgd', steps=12)
  config.eval_every, config.checkpoint_every, config.keep_checkpoints, config.keep_best = 2, 3, 2, 1
  config.sgd.learning_rate = 0.05
  run = build(config)
  scores = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 4.0, 12: 6.0}

  def evaluate(state, batch):
    # By state: the step is all that it may know.
    return {**run.evaluate(state, batch), 'error': np.float32(scores[int(state.step)])}

  train(config, tmp_path, quiet=True, run=run._replace(evaluate=evaluate))
  with open_checkpoints(tmp_path) as found:
    assert sorted(found.all_steps()) == [4, 9, 12]


@pytest.mark.long
def test_the_export_is_the_model_as_it_was_evaluated(tmp_path):
  config = classifier()
  config.steps, config.eval_every = 6, 3
  config.recipe.average = 0.9
  run = build(config)
  scores = train(config, tmp_path, quiet=True, run=run)[-1]
  variables, about = load_export(tmp_path / 'export')
  assert about['step'] == 6 and about['config']['model']['name'] == 'mlp'
  assert about['scores']['accuracy'] == scores['eval_accuracy']
  hits = total = 0
  for batch in run.eval_batches():
    logits = run.task.model.apply(variables, np.asarray(batch['inputs']), train=False)
    hits += float(((np.asarray(logits).argmax(-1) == batch['label']) * batch['mask']).sum())
    total += float(batch['mask'].sum())
  assert hits / total == pytest.approx(scores['eval_accuracy'], abs=1e-6)
  with pytest.raises(ConfigError, match='no export in'):
    load_export(tmp_path / 'nothing')


def test_a_signal_saves_and_the_next_call_goes_on(tmp_path):
  config = small('sgd', steps=9)
  run = build(config)
  train(config, tmp_path / 'whole', quiet=True, run=run)
  for at, number in ((3, signal.SIGTERM), (7, signal.SIGUSR1)):

    def step(state, batch, n, at=at, number=number):
      if n == at:
        os.kill(os.getpid(), number)
      return run.step(state, batch, n)

    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f'saved step {at + 1} of 9; the same command goes on'):
      train(config, tmp_path / 'parts', quiet=True, run=run._replace(step=step))
    assert signal.getsignal(number) == before
  train(config, tmp_path / 'parts', quiet=True, run=run)
  assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole')


def ruin(path, how):
  """Damages a checkpoint's folder."""
  if how == 'empty':
    shutil.rmtree(path)
    path.mkdir()
  elif how == 'no data':
    shutil.rmtree(path / 'state')
  elif how == 'no position':
    shutil.rmtree(path / 'run')
  else:
    for file in path.rglob('d/*'):  # those that hold arrays; which of them a restore reads differs from save to save
      data = file.read_bytes()
      file.write_bytes(data[: len(data) // 2] if how == 'truncated' else b'\0' * len(data))


@pytest.mark.brief('no position')
@pytest.mark.parametrize(
  'how', ['truncated', 'no position', *(pytest.param(h, marks=pytest.mark.long) for h in ('zeros', 'empty', 'no data'))]
)
def test_a_checkpoint_that_cannot_be_read_is_set_aside(tmp_path, how):
  config = small('sgd', steps=9)
  config.checkpoint_every, config.keep_checkpoints = 3, 3
  run = build(config)
  train(config, tmp_path / 'whole', quiet=True, run=run)
  with pytest.raises(KeyboardInterrupt):
    train(config, tmp_path / 'parts', quiet=True, run=cut(run, 7))
  ruin(tmp_path / 'parts' / 'checkpoints' / '6', how)
  train(config, tmp_path / 'parts', quiet=True, run=run)
  assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole')
  warning, resumed = (json.loads(line) for line in (tmp_path / 'parts' / 'events.jsonl').read_text().splitlines())
  assert 'the checkpoint of step 6 cannot be read' in warning['words'] and resumed['step'] == 3
  assert (tmp_path / 'parts' / 'unreadable' / '6.0').is_dir()
  with open_checkpoints(tmp_path / 'parts') as found:
    assert sorted(found.all_steps()) == [3, 6, 9]


def test_where_no_checkpoint_can_be_read_nothing_is_overwritten(tmp_path):
  config = small('sgd', steps=3)
  train(config, tmp_path, quiet=True)
  ruin(tmp_path / 'checkpoints' / '3', 'truncated')
  config.steps = 6
  with pytest.raises(RunError, match=r'none of the checkpoints 3 in .+ can be read .+; move them away to begin anew'):
    train(config, tmp_path, quiet=True)
  assert steps_of(tmp_path) == [1, 2, 3] and (tmp_path / 'checkpoints' / '3').is_dir()


@pytest.mark.long
def test_a_checkpoint_of_another_run_is_refused(tmp_path):
  train(small('sgd', steps=3), tmp_path / 'a', quiet=True)
  other = small('sgd', steps=3)
  other.model.widths = (12, 8)
  train(other, tmp_path / 'b', quiet=True)
  shutil.rmtree(tmp_path / 'a' / 'checkpoints')
  shutil.copytree(tmp_path / 'b' / 'checkpoints', tmp_path / 'a' / 'checkpoints')
  with pytest.raises(ConfigError, match=r'3 is of a run with another model\.widths; choose another --workdir'):
    train(small('sgd', steps=6), tmp_path / 'a', quiet=True)


def test_a_run_goes_on_with_a_release_that_has_more_options():
  """At their defaults they change nothing."""
  config = small()
  old = as_json(config)
  del old['data']['colour'], old['faults'], old['seed']
  assert changes(old, as_json(config)) == []
  config.data.colour, config.model.widths, config.steps = 0.5, (8, 8), 7
  assert set(changes(old, as_json(config))) == {'data.colour', 'model.widths'}


@pytest.mark.long
def test_a_folder_has_one_run_at_a_time(tmp_path):
  train(small('sgd', steps=3), tmp_path, quiet=True)
  before = (tmp_path / 'metrics.jsonl').read_text()
  holder = subprocess.Popen(
    [sys.executable, '-c', f'from pathlib import Path; from kronmesh.train.runtime.workdir import claimed\n'
     f'with claimed(Path({str(tmp_path)!r})): print("held", flush=True); input()'],
    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert holder.stdout.readline() == 'held\n'
  with pytest.raises(ConfigError, match=rf'in use by another run \(process {holder.pid} on .+\); wait'):
    train(small('sgd', steps=6), tmp_path, quiet=True)
  assert (tmp_path / 'metrics.jsonl').read_text() == before
  holder.kill()
  holder.wait()
  train(small('sgd', steps=6), tmp_path, quiet=True)


@pytest.mark.long
def test_lines_that_a_killed_process_left_unfinished_are_dropped(tmp_path):
  config = small('sgd', steps=6)
  config.checkpoint_every = 3
  run = build(config)
  train(config, tmp_path / 'whole', quiet=True, run=run)
  with pytest.raises(KeyboardInterrupt):
    train(config, tmp_path / 'parts', quiet=True, run=cut(run, 4))
  with (tmp_path / 'parts' / 'metrics.jsonl').open('a') as log:
    log.write('{"step": 4, "lo')
  train(config, tmp_path / 'parts', quiet=True, run=run)
  assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole')


@pytest.mark.parametrize('text', ['', '{"seed": 0', '[1, 2]', '\0\0'])
def test_a_config_that_is_none_is_named(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ConfigError, match=r'config.json cannot be read as a config; choose another --workdir'):
    train(small(), tmp_path, quiet=True)
  assert sorted(p.name for p in tmp_path.iterdir() if p.name != '.lock') == ['config.json']


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 3 MB."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  yield disk
  subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.long
def test_a_full_disk_ends_the_run_in_one_line_and_spoils_nothing(tmp_path, small_disk):
  config = small('sgd', steps=60)
  config.checkpoint_every, config.keep_checkpoints = 3, 1000
  run = build(config)
  with pytest.raises(RunError, match=r'cannot write to .+: No space left on device; the same command goes on'):
    train(config, small_disk / 'run', quiet=True, run=run)
  (tmp_path / 'moved').mkdir()
  shutil.copytree(small_disk / 'run', tmp_path / 'moved' / 'run')
  train(config, tmp_path / 'moved' / 'run', quiet=True, run=run)
  train(config, tmp_path / 'whole', quiet=True, run=run)
  assert losses(tmp_path / 'moved' / 'run') == losses(tmp_path / 'whole')


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match=r'--workdir=.+/file/run: Not a directory'):
    train(small(), tmp_path / 'file' / 'run', quiet=True)


def test_what_the_operating_system_says_is_found_behind_other_errors(tmp_path):
  inner = ValueError('RESOURCE_EXHAUSTED: Error writing "d/1": No space left on device [OS error 28: ENOSPC]')
  with pytest.raises(RunError, match='No space left'), storage_errors(tmp_path):
    raise RuntimeError('a save failed') from inner
  with pytest.raises(RuntimeError, match='a bug'), storage_errors(tmp_path):
    raise RuntimeError('a bug')


@pytest.mark.long
def test_a_save_by_time(tmp_path, monkeypatch):
  config = small('sgd', steps=12)
  config.log_every, config.keep_checkpoints, config.checkpoint_minutes = 2, 10, 1.0
  clock = iter(range(0, 10**6, 25))  # seconds, at every look
  monkeypatch.setattr(checkpoints, 'monotonic', lambda: next(clock))
  train(config, tmp_path, quiet=True)
  with open_checkpoints(tmp_path) as found:
    steps = sorted(found.all_steps())
  assert steps[-1] == 12 and 1 < len(steps) < 6


@pytest.mark.long
def test_the_evaluation_is_logged_once(tmp_path):
  config = small('sgd', steps=6)
  config.checkpoint_every = 3
  parts_of(config, tmp_path, 5)
  assert [row['step'] for row in rows(tmp_path) if 'seconds' in row] == [3, 6]


def test_a_run_killed_between_its_last_save_and_its_export_exports(tmp_path):
  config = small('sgd', steps=3)
  train(config, tmp_path, quiet=True)
  before, about = load_export(tmp_path / 'export')
  shutil.rmtree(tmp_path / 'export')
  train(config, tmp_path, quiet=True)
  after, again = load_export(tmp_path / 'export')
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert about == again


def test_being_told_to_stop_without_checkpoints_is_no_promise(tmp_path):
  config = small('sgd', steps=6)
  config.keep_checkpoints = 0
  run = build(config)

  def step(state, batch, number):
    if number == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return run.step(state, batch, number)

  with pytest.raises(
    RunError, match=r'told to stop after step 4 of 6; config.keep_checkpoints=0 saves nothing'
  ) as error:
    train(config, tmp_path, quiet=True, run=run._replace(step=step))
  assert not isinstance(error.value, Preempted)
