"""What a power cut leaves of a run: on a disk of its own, where the machine allows it, and by the order of calls."""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kronmesh import files
from kronmesh.train.loop import train
from kronmesh.train.runtime import durable
from kronmesh.train.runtime.workdir import read_rows
from tests.experiments.small import losses, small

ROOT = Path(__file__).parents[2]
_SHUTDOWN, _NO_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH


@pytest.fixture
def disk(tmp_path):
  """A folder with an ext4 file system of its own, and a function that cuts its power and mounts it again."""
  image, mount = tmp_path / 'image', tmp_path / 'disk'
  mount.mkdir()
  if os.getuid() or not shutil.which('mkfs.ext4'):
    pytest.skip('needs root and mkfs.ext4')
  with image.open('wb') as file:
    file.truncate(200 << 20)
  subprocess.run(['mkfs.ext4', '-q', '-F', image], check=True)
  if subprocess.run(['mount', '-o', 'loop', image, mount], capture_output=True).returncode:
    pytest.skip('this machine mounts no loop devices')

  def cut():
    number = os.open(mount, os.O_RDONLY)
    try:
      fcntl.ioctl(number, _SHUTDOWN, struct.pack('I', _NO_FLUSH))
    finally:
      os.close(number)

  def again():
    subprocess.run(['umount', mount], check=True)
    subprocess.run(['mount', '-o', 'loop', image, mount], check=True)

  yield mount, cut, again
  subprocess.run(['umount', '-l', mount], check=True)


def command(workdir, steps):
  return [
    sys.executable, 'experiments/train.py', '--config=experiments/configs/digits_classifier.py', '--config.devices=1',
    '--config.mesh=data=1', '--config.optimizer=sgd', '--config.data.batch_size=64', '--config.checkpoint_every=5',
    '--config.log_every=5', f'--config.steps={steps}', f'--workdir={workdir}',
  ]  # fmt: skip


def saved(workdir):
  return [int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit()]


@pytest.mark.long
@pytest.mark.parametrize('seconds', [0.0, 8.0])
def test_a_power_cut_loses_nothing_that_was_saved(disk, seconds):
  mount, cut, again = disk
  workdir = mount / 'run'
  running = subprocess.Popen(command(workdir, 10**6), cwd=ROOT, stderr=subprocess.DEVNULL)
  end = time.monotonic() + 120
  while max(saved(workdir), default=0) < 20 and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(seconds)
  before = saved(workdir)
  # A checkpoint that has just got its name is still being written; the one before it is on the disk, or was not removed.
  sure = sorted(before)[-2]
  cut()
  running.kill()
  running.wait()
  again()
  text = subprocess.run(
    command(workdir, max(before) + 100), cwd=ROOT, capture_output=True, text=True, check=True
  ).stderr
  resumed = [row['step'] for row in read_rows(workdir / 'events.jsonl') if row['kind'] == 'resumed']
  assert resumed and resumed[-1] >= sure, text
  steps = [row['step'] for row in read_rows(workdir / 'metrics.jsonl') if 'loss' in row]
  assert steps == list(range(1, max(before) + 101))


def test_content_is_on_the_disk_before_its_name_and_its_name_before_anything_is_removed(tmp_path, monkeypatch):
  calls = []

  def note(kind, fn, place):
    def noted(*args, **kwargs):
      calls.append((kind, Path(os.fspath(args[place] if place is not None else args[0]))))
      return fn(*args, **kwargs)

    return noted

  monkeypatch.setattr(files, 'sync_tree', note('content', files.sync_tree, 0))
  monkeypatch.setattr(files, 'sync_folder', note('names', files.sync_folder, 0))
  monkeypatch.setattr(durable, 'sync_rows', note('rows', durable.sync_rows, 0))
  monkeypatch.setattr(os, 'rename', note('rename', os.rename, 0))
  monkeypatch.setattr(shutil, 'rmtree', note('remove', shutil.rmtree, 0))
  config = small('sgd', steps=12)
  config.checkpoint_every, config.keep_checkpoints = 4, 1
  train(config, tmp_path / 'run', quiet=True)
  kept = tmp_path / 'run/checkpoints'
  at = lambda kind, path: calls.index((kind, path))  # noqa: E731
  for step in (4, 8, 12):
    unfinished = kept / f'{step}.orbax-checkpoint-tmp'
    assert at('content', unfinished) < at('rename', unfinished) < at('content', kept / str(step))
  named = [i for i, call in enumerate(calls) if call == ('names', kept)]
  removed = [at('remove', kept / str(step)) for step in (4, 8)]
  assert at('content', kept / '8') < named[1] < removed[0] < at('content', kept / '12') < named[2] < removed[1]
  assert [kind for kind, _ in calls].index('rows') < at('content', kept / '4.orbax-checkpoint-tmp')
  assert at('content', tmp_path / 'run/export.orbax-checkpoint-tmp') < at(
    'rename', tmp_path / 'run/export.orbax-checkpoint-tmp'
  )
  assert losses(tmp_path / 'run')


def test_a_file_is_whole_or_not_there(tmp_path):
  path = tmp_path / 'file'
  files.write(path, 'before')
  with pytest.raises(ValueError, match='no more'), files.replacing(path) as file:
    file.write(b'half')
    raise ValueError('no more')
  assert path.read_text() == 'before' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_a_line_is_whole_or_stands_alone(tmp_path):
  path = tmp_path / 'rows'
  files.append_lines(path, ['one', 'two'])
  with path.open('a') as file:
    file.write('half')
  files.append_lines(path, ['three'], sync=True)
  assert path.read_text().splitlines() == ['one', 'two', 'half', 'three']
