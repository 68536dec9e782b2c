"""Commands that are told to stop while they start, lose their terminal, or are given folders that are none."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.configs import digits
from kronmesh.train import jsonfile
from kronmesh.train.errors import ConfigError
from kronmesh.train.runtime.starting import is_command
from kronmesh.train.runtime.terminal import Lossy
from kronmesh.train.runtime.workdir import read_rows
from kronmesh.train.settings.ranges import check_ranges
from tests import commands

ROOT = Path(__file__).parents[2]
SMALL = ['--config=experiments/configs/digits.py', '--config.model.widths=(16, 8)', '--config.data.batch_size=64']
SMALL += ['--config.optimizer=sgd', '--config.devices=1', '--config.mesh=data=1', '--config.eval_every=1000']


# What runs the tests may ignore these, and so would what it starts.
HEED = (
  'import os, signal, sys\n'
  'for number in (signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_DFL)\n'
  'os.execv(sys.executable, sys.argv[1:])'
)


def train(workdir, *more, **options):
  command = [sys.executable, '-c', HEED, sys.executable, 'experiments/train.py', *SMALL, f'--workdir={workdir}', *more]
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True} | options
  return subprocess.Popen(command, cwd=ROOT, **options)


def until(condition, process, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end and process.poll() is None, process.communicate()
    time.sleep(0.005)


def catches(process, number):
  """Whether a process has a handler for a signal."""
  lines = Path(f'/proc/{process.pid}/status').read_text().splitlines()
  caught = next(int(line.split()[1], 16) for line in lines if line.startswith('SigCgt'))
  return bool(caught >> (number - 1) & 1)


CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


@pytest.mark.parametrize('number', CODES)
def test_told_to_stop_while_python_still_imports(tmp_path, number):
  process = train(tmp_path / 'run')
  until(lambda: catches(process, signal.SIGTERM) and catches(process, signal.SIGINT), process)
  process.send_signal(number)
  output, errors = process.communicate(timeout=60)
  assert process.returncode == CODES[number] and 'Traceback' not in errors and output == ''
  (line,) = errors.splitlines()
  assert line.startswith('error: ') and line.endswith('the same command goes on')
  assert not (tmp_path / 'run').exists()


@pytest.mark.long
@pytest.mark.parametrize('number', CODES)
@pytest.mark.parametrize('resumes', [False, True])
def test_told_to_stop_while_a_run_is_built_or_restored(tmp_path, number, resumes):
  if resumes:
    assert train(tmp_path, '--config.steps=5').wait(120) == 0
  old = (tmp_path / 'config.json').stat().st_mtime_ns if resumes else 0
  process = train(tmp_path, '--config.steps=10')
  config = tmp_path / 'config.json'
  until(lambda: config.exists() and config.stat().st_mtime_ns != old, process)
  process.send_signal(number)
  errors = process.communicate(timeout=60)[1]
  assert process.returncode == CODES[number] and 'Traceback' not in errors, errors
  again = train(tmp_path, '--config.steps=10')
  errors = again.communicate(timeout=120)[1]
  assert again.returncode == 0, errors
  assert [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl') if 'loss' in row] == list(range(1, 11))


def test_a_test_run_is_no_command():
  assert not is_command()


def steps_of(workdir):
  return [row['step'] for row in read_rows(workdir / 'metrics.jsonl') if 'loss' in row]


@pytest.mark.long
@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_full_stream_ends_nothing(tmp_path, stream):
  with open('/dev/full', 'w') as full:
    process = train(tmp_path, '--config.steps=4', '--config.log_every=1', **{stream: full})
    output, errors = process.communicate(timeout=120)
  assert process.returncode == 0 and steps_of(tmp_path) == [1, 2, 3, 4]
  if stream == 'stdout':
    assert 'standard output cannot be written' in errors and 'No space left' in errors
  else:
    assert 'report.html' in output


@pytest.mark.long
def test_a_closed_pipe_ends_nothing(tmp_path):
  process = train(tmp_path, '--config.steps=4', '--config.log_every=1')
  process.stdout.close()
  errors = process.stderr.read()
  assert process.wait(120) == 0 and steps_of(tmp_path) == [1, 2, 3, 4] and 'Error' not in errors


def test_a_stream_that_is_lost_is_told_once(tmp_path, capfd):
  with open('/dev/full', 'w') as full, (tmp_path / 'other').open('w') as other:
    stream = Lossy(full, 'standard output', other)
    for _ in range(3):
      assert stream.write('words\n') == 6
      stream.flush()
    assert stream.fileno() == full.fileno() and not stream.isatty()
  assert (tmp_path / 'other').read_text().count('cannot be written') == 1


@pytest.mark.brief('command1')
@pytest.mark.parametrize('command', [
  ['experiments/train.py', '--workdir='], ['experiments/train.py', '--workdir=  '],
  ['experiments/train.py', '--workdir=gs://bucket/run'], ['experiments/sweep.py', '--workdir=s3://bucket/run'],
  ['experiments/compare.py', '--workdir=file:///tmp/run'],
  ['scripts/find.py', '--videos=.', '--example=x', '--workdir=gs://bucket/run'],
])  # fmt: skip
def test_folders_that_are_none(tmp_path, command):
  done = commands.run(ROOT / command[0], *command[1:], cwd=tmp_path)
  assert done.returncode == 2 and not list(tmp_path.iterdir())
  (line,) = done.stderr.splitlines()
  assert 'must be a folder on this machine' in line and '--workdir' in line


def test_what_is_not_finite_is_null():
  row = {'loss': math.nan, 'eval': {'x': [math.inf, 1.0]}, 'step': 3, 'words': 'NaN', 'none': None}
  text = jsonfile.dumps(row)
  assert json.loads(text, parse_constant=lambda word: 1 / 0) == {
    'loss': None, 'eval': {'x': [None, 1.0]}, 'step': 3, 'words': 'NaN', 'none': None
  }  # fmt: skip
  back = jsonfile.read_row(text)
  assert math.isnan(back['loss']) and math.isnan(back['eval']['x'][0]) and back['words'] == 'NaN'


def test_everything_is_written_by_that_module():
  for path in (*(ROOT / 'experiments').rglob('*.py'), *(ROOT / 'scripts').rglob('*.py')):
    if path.name not in ('jsonfile.py', 'pykeen_links.py'):  # which runs where kronmesh is not installed
      text = path.read_text().replace('jsonfile.dumps', '')
      assert 'json.dump' not in text, path


@pytest.mark.long
def test_a_diverging_run_leaves_json(tmp_path):
  """A parser that knows no NaN reads every line that such a run writes."""
  more = [
    '--config.steps=6',
    '--config.sgd.learning_rate=1e30',
    '--config.sgd.schedule=constant',
    '--config.log_every=1',
  ]
  more += ['--config.eval_every=2', '--config.faults.limit=100', f'--workdir={tmp_path}']
  commands.run('experiments/train.py', *SMALL, *more)
  lines = [line for path in tmp_path.glob('*.jsonl') for line in path.read_text().splitlines()]
  rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f'{word} is not JSON')) for line in lines]
  assert len(rows) > 10 and '": null' in ''.join(lines)


@pytest.mark.long
@pytest.mark.parametrize('environment', [{}, {'KRONMESH_DATA': '{tmp}/data'}], ids=['nothing', 'a folder for data'])
def test_a_user_without_a_home(tmp_path, environment):
  """One line that says what to set; with it, a run."""
  code = (
    'import os, pathlib, runpy, sys\n'
    'def home(): raise RuntimeError("Could not determine home directory.")\n'
    'pathlib.Path.home = home\n'
    'sys.argv = sys.argv[1:]\n'
    'runpy.run_path(sys.argv[0], run_name="__main__")\n'
  )
  env = {k: v for k, v in os.environ.items() if k not in ('HOME', 'KRONMESH_DATA')}
  env |= {k: v.format(tmp=tmp_path) for k, v in environment.items()}
  command = [sys.executable, '-c', code, str(ROOT / 'experiments/train.py'), *SMALL, '--config.steps=2']
  done = subprocess.run(
    [*command, f'--workdir={tmp_path / "run"}'], cwd=ROOT, capture_output=True, text=True, timeout=120, env=env
  )
  if environment:
    assert done.returncode == 0, done.stderr
  else:
    assert done.returncode == 2 and done.stderr.startswith('error: this user has no home folder; set KRONMESH_DATA')


@pytest.mark.parametrize('seed,fits', [(0, True), (2**31 - 1, True), (2**31, False), (2**64, False), (-1, False)])
@pytest.mark.parametrize('key', ['seed', 'data.graph_seed'])
def test_seeds_that_a_key_can_hold(key, seed, fits):
  config = digits.get_config()
  config.update_from_flattened_dict({key: seed})
  if fits:
    check_ranges(config)
  else:
    with pytest.raises(ConfigError, match=rf'config\.{key}={seed} must be (at least 0|in \(-2147483648, 2147483648\))'):
      check_ranges(config)
