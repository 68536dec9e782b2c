"""Real processes: they train, checkpoint and evaluate as one would, and stop when one of them does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kronmesh import data
from kronmesh.train import checkpoints
from kronmesh.train.errors import RunError
from kronmesh.train.runtime import processes
from kronmesh.train.runtime.processes import is_lost
from scripts.kill import ONE, TWO, Layout, kill_often
from tests import commands

ROOT = Path(__file__).parents[2]
SMALL = [
  '--config=experiments/configs/digits.py',
  '--config.model.widths=(16, 8)',
  '--config.data.batch_size=64',
  '--config.eval_every=3',
  '--config.checkpoint_every=3',
  '--config.kfac.damping=0.01',
  '--config.kfac.inverses_every=2',
  '--config.kfac.schedule=constant',
]
SHORT = ['--config.steps=3', '--config.devices=1', '--config.mesh=data=-1']
long = pytest.mark.long
FOUR = Layout(1, 4, 'data=2,model=2')


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def group(commands, **environment):
  """Running processes, killed in the end; stdout and stderr of each go to one pipe."""
  env = {**os.environ, **environment}
  found = [
    subprocess.Popen(c, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for c in commands
  ]
  try:
    yield found
  finally:
    for p in found:
      if p.poll() is None:
        p.send_signal(signal.SIGCONT)
        p.kill()
      p.wait()


def train_commands(processes, devices, mesh, workdir, *more, own=None, base=SMALL):
  """`own`: further flags of one process, by its number."""
  port = free_port()
  join = [f'--coordinator_address=localhost:{port}', f'--num_processes={processes}'] if processes > 1 else []
  common = [sys.executable, 'experiments/train.py', *base, f'--config.devices={devices}', f'--config.mesh={mesh}']
  common += [f'--workdir={workdir}', *more, *join]
  return [[*common, *([f'--process_id={i}'] if join else []), *(own or {}).get(i, [])] for i in range(processes)]


def run(*args, **kwargs):
  with group(train_commands(*args, **kwargs)) as processes:
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), outputs
  return outputs


def rows(workdir, key='loss'):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return np.array([line[key] for line in lines if key in line])


@pytest.mark.parametrize(
  'processes, devices, mesh',
  [
    pytest.param(2, 2, 'data=2,model=2', marks=long),
    pytest.param(2, 2, 'model=2,data=2', marks=long),  # both processes need all rows
    pytest.param(2, 4, 'data=4,model=2', marks=long),
    pytest.param(4, 1, 'data=2,fsdp=2', marks=long),
  ],
)
def test_a_group_trains_as_one_process_does(tmp_path, processes, devices, mesh):
  outputs = run(processes, devices, mesh, tmp_path / 'group', '--config.steps=6')
  run(1, processes * devices, mesh, tmp_path / 'one', '--config.steps=6')
  for key in ('loss', 'eval_error'):
    np.testing.assert_allclose(rows(tmp_path / 'group', key), rows(tmp_path / 'one', key), rtol=1e-5)
  assert len(rows(tmp_path / 'group')) == 6
  assert 'after 6 steps' in outputs[0] and 'after 6 steps' not in outputs[1]  # one of them speaks


@long
def test_one_prepares_the_data_for_all(tmp_path, video_folder):
  """Several at once would be in each other's way."""
  small = ['model.blocks=(1,)', 'model.width=4', 'model.stem=patches', 'data.image_size=16', 'data.batch_size=8']
  small += ['kfac.subsample=1.0', 'kfac.warmup_steps=0', 'data.frames=4', 'eval_every=2', 'steps=2']
  settings = [f'--config.{s}' for s in (*small, f'data.source={video_folder}', f'data.folder={tmp_path / "data"}')]
  outputs = run(2, 1, 'data=2', tmp_path / 'run', base=['--config=experiments/configs/videos.py', *settings])
  assert 'preparing' in outputs[0] and 'preparing' not in outputs[1] and len(rows(tmp_path / 'run')) == 2


@long
def test_each_process_has_its_own_strips(tmp_path, video_folder):
  """And decodes their bands alone: two processes with a half of every frame train as one does."""
  small = ['model.blocks=(1,)', 'model.width=4', 'model.stem=small', 'model.dtype=float32', 'data.image_size=19']
  small += [
    'data.image_width=16',
    'data.batch_size=8',
    'data.bands=2',
    'data.colour=0',
    'data.frames=4',
    'eval_every=2',
  ]
  small += ['kfac.subsample=1.0', 'kfac.warmup_steps=0', 'recipe.cutmix=0', 'steps=4']
  settings = [f'--config.{s}' for s in (*small, f'data.source={video_folder}', f'data.folder={tmp_path / "data"}')]
  base = ['--config=experiments/configs/videos.py', *settings]
  run(2, 1, 'space=2', tmp_path / 'group', base=base)
  run(1, 1, 'data=1', tmp_path / 'one', base=base)
  for key in ('loss', 'eval_loss'):
    np.testing.assert_allclose(rows(tmp_path / 'group', key), rows(tmp_path / 'one', key), rtol=1e-4)
  assert len(rows(tmp_path / 'group')) == 4


@long
def test_layers_over_processes(tmp_path):
  base = ['--config=experiments/configs/noise.py:small_video', '--config.kfac.subsample=1.0', '--config.steps=4']
  run(2, 2, 'pipe=2,data=2', tmp_path / 'group', base=base)
  run(1, 1, 'data=1', tmp_path / 'one', base=base)
  np.testing.assert_allclose(rows(tmp_path / 'group'), rows(tmp_path / 'one'), rtol=1e-5)


@long
def test_another_group_goes_on_from_the_checkpoint(tmp_path):
  """Three steps by 2 x 2 devices, three by one process of one device, against six at once."""
  run(2, 2, 'data=2,model=2', tmp_path / 'parts', '--config.steps=3')
  run(1, 1, 'data=1', tmp_path / 'parts', '--config.steps=6')
  run(1, 1, 'data=1', tmp_path / 'whole', '--config.steps=6')
  np.testing.assert_allclose(rows(tmp_path / 'parts'), rows(tmp_path / 'whole'), rtol=1e-5)


@long
def test_a_larger_group_goes_on_from_the_checkpoint(tmp_path):
  run(1, 1, 'data=1', tmp_path / 'parts', '--config.steps=3')
  run(4, 1, 'data=2,model=2', tmp_path / 'parts', '--config.steps=6', '--config.placement.inverses=owners')
  run(1, 1, 'data=1', tmp_path / 'whole', '--config.steps=6')
  np.testing.assert_allclose(rows(tmp_path / 'parts'), rows(tmp_path / 'whole'), rtol=1e-5)


MODELS = ('mlp', 'resnet', 'convnet', 'transformer')


@pytest.mark.parametrize(
  'mesh, dtype, tolerance',
  [
    pytest.param('data=4,model=2', 'float32', 1e-5, marks=long),
    pytest.param('model=2,data=4', 'float64', 1e-10, marks=long),
  ],
)
def test_two_processes_equal_one_device(tmp_path, mesh, dtype, tolerance):
  """Losses, gradients, factors and parameters of every family."""
  address = f'localhost:{free_port()}'
  command = lambda n, *more: [sys.executable, '-m', 'tests.parallel.worker', *more, dtype, str(tmp_path / n), *MODELS]  # noqa: E731
  for n in ('two', 'one'):
    (tmp_path / n).mkdir()
  for group_of in (
    [command('two', address, '2', str(i), '4', mesh) for i in range(2)],
    [command('one', f'localhost:{free_port()}', '1', '0', '1', 'data=1')],
  ):
    with group(group_of) as processes:
      outputs = [p.communicate(timeout=400)[0] for p in processes]
      assert all(p.returncode == 0 for p in processes), outputs
  for name in MODELS:
    found, expected = (np.load(tmp_path / n / f'{name}.npz') for n in ('two', 'one'))
    for key in expected:
      assert np.linalg.norm(found[key] - expected[key]) <= tolerance * np.linalg.norm(expected[key]), (name, key)
  assert jnp.dtype(dtype) == expected['parameters'].dtype


def wait_for_steps(workdir, processes):
  start = time.monotonic()
  while not (workdir / 'metrics.jsonl').exists() or '"step": 6' not in (workdir / 'metrics.jsonl').read_text():
    ended = [p.communicate(timeout=60)[0] for p in processes if p.poll() is not None]
    assert time.monotonic() - start < 120 and not ended, ended
    time.sleep(0.2)


ENDLESS = ('--config.steps=1000000', '--config.log_every=3')


def test_which_errors_tell_of_a_lost_process():
  """Those of the runtime, in its own type, as the text of a fetched array's, or behind a save that waited."""
  runtime = jax.errors.JaxRuntimeError('UNAVAILABLE: another task died')
  save = TimeoutError('Timed out while waiting for async_write_complete barrier.')
  assert not is_lost(save)
  save.__cause__ = runtime
  fetched = ValueError('UNKNOWN: Gloo all-reduce failed: Connection closed by peer')
  assert all(is_lost(error) for error in (runtime, save, fetched))
  assert not is_lost(ValueError('operands could not be broadcast: UNKNOWN: shapes'))


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('error', [RunError, OSError])
def test_a_process_that_fails_alone_does_not_wait_for_a_save(tmp_path, monkeypatch, several, error):
  closed = []
  monkeypatch.setattr(processes, 'several', lambda: several)
  monkeypatch.setattr(ocp.CheckpointManager, 'close', lambda _: closed.append(True))
  with pytest.raises(error), checkpoints.open_checkpoints(tmp_path):
    raise error
  assert closed == ([] if several and error is OSError else [True])
  with checkpoints.open_checkpoints(tmp_path):
    closed.clear()
  assert closed == [True]


@long
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_is_killed_the_other_stops_and_names_it(tmp_path, victim):
  with group(train_commands(2, 1, 'data=2', tmp_path, *ENDLESS)) as processes:
    wait_for_steps(tmp_path, processes)
    processes[victim].kill()
    start = time.monotonic()
    output = processes[1 - victim].communicate(timeout=60)[0]
  assert time.monotonic() - start < 60
  # Without process 0 the runtime itself may be the first to notice, and names it as the leader.
  words = {1: ('process 0: process 1 died at step',), 0: ('process 1: process 0 died at step', 'leader')}
  assert any(w in output for w in words[victim]), output
  assert processes[1 - victim].returncode in ((4,) if victim else (4, -signal.SIGABRT))


def faulty_commands(how, victim, workdir, *more):
  commands = train_commands(2, 1, 'data=2', workdir, *ENDLESS, '--config.optimizer=sgd', *more)
  commands[victim][1:2] = ['-m', 'tests.experiments.faulty', how]
  return commands


@long
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_raises_the_others_stop_and_name_it(tmp_path, victim):
  with group(faulty_commands('raise', victim, tmp_path)) as processes:
    outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert f"error: process {victim}: KeyError: 'a bug'" in outputs[victim] and processes[victim].returncode == 3, outputs
  words = f'process {1 - victim}: process {victim} stopped at step'
  assert words in outputs[1 - victim] and processes[1 - victim].returncode == 4, outputs
  assert all('Traceback' not in output for output in outputs), outputs


@long
@pytest.mark.parametrize('policy', ['skip', 'rollback'])
def test_a_fault_is_handled_alike_by_all(tmp_path, policy):
  """A batch that is not finite; by K-FAC, whose inverses wait too."""
  more = ['--config.steps=30', '--config.log_every=6', f'--config.faults.not_finite={policy}']
  commands = train_commands(2, 2, 'data=2,model=2', tmp_path, *more)
  for command in commands:
    command[1:2] = ['-m', 'tests.experiments.faulty', 'nan']
  with group(commands) as processes:
    outputs = [p.communicate(timeout=200)[0] for p in processes]
  assert all(p.returncode == 0 for p in processes), outputs
  assert 'fault: step 21: the batch holds values that are not finite' in outputs[0] and 'fault' not in outputs[1]
  assert len(rows(tmp_path)) == (29 if policy == 'skip' else 30)


@long
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_hangs_all_stop_and_name_it(tmp_path, victim):
  """It waits for something, and its threads go on: no heartbeat tells."""
  with group(faulty_commands('hang', victim, tmp_path, '--config.watchdog_seconds=5')) as processes:
    wait_for_steps(tmp_path, processes)
    start = time.monotonic()
    outputs = [p.communicate(timeout=60)[0] for p in processes]
  assert time.monotonic() - start < 60
  assert any(f'process {victim} hangs, it has not come to step 20' in output for output in outputs), outputs
  assert all(p.returncode == 4 for p in processes), outputs


@long
@pytest.mark.parametrize('victim', [0, 1])
def test_a_hang_before_the_first_step_is_noticed_and_named(tmp_path, victim):
  """While data are read and the run is built, as of a disk that does not answer."""
  with group(faulty_commands('hang at the start', victim, tmp_path, '--config.watchdog_seconds=5')) as processes:
    outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert all(f'process {victim} hangs at train.py:' in output for output in outputs), outputs
  assert all(p.returncode == 4 for p in processes), outputs


@long
def test_a_job_that_is_stopped_as_a_whole_and_continued_goes_on(tmp_path):
  """As schedulers do. It stands still for longer than a process may be silent."""
  with group(train_commands(2, 1, 'data=2', tmp_path, *ENDLESS)) as processes:
    wait_for_steps(tmp_path, processes)
    for p in processes:
      p.send_signal(signal.SIGSTOP)
    time.sleep(25)
    before = (tmp_path / 'metrics.jsonl').stat().st_size
    for p in processes:
      p.send_signal(signal.SIGCONT)
    time.sleep(8)
    assert [p.poll() for p in processes] == [None, None] and (tmp_path / 'metrics.jsonl').stat().st_size > before


@pytest.mark.parametrize('key, own', [
  pytest.param('config.kfac.learning_rate', '--config.kfac.learning_rate=0.123', marks=long),
  pytest.param('config.seed', '--config.seed=1', marks=long),
  ('config.steps', '--config.steps=30'),
])  # fmt: skip
def test_processes_that_were_told_different_things_train_nothing(tmp_path, key, own):
  with group(train_commands(2, 1, 'data=2', tmp_path, '--config.steps=20', own={1: [own]})) as processes:
    outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert [p.returncode for p in processes] == [2, 2], outputs
  assert all(f'process 1 has {key}=' in output and 'where process 0 has' in output for output in outputs), outputs
  assert not (tmp_path / 'metrics.jsonl').exists()


@long
def test_processes_that_see_different_data_train_nothing(tmp_path):
  for number in (0, 1):
    rng = np.random.default_rng(number)
    for split in ('train', 'test'):
      path = tmp_path / f'data{number}' / split
      data.write_arrays(data.Arrays(rng.random((64, 8, 8, 1), np.float32), np.zeros(64, np.int32)), path)
  (tmp_path / 'data').mkdir()
  base = [*SMALL, '--config.data.name=arrays', f'--config.data.source={tmp_path / "data"}']
  base += ['--config.data.eval_batch_size=64']
  commands = train_commands(2, 1, 'data=2', tmp_path / 'run', *SHORT[:1], base=base)
  for number, command in enumerate(commands):  # each on a machine of its own, whose disk has another content
    mount = f'mount --bind {tmp_path}/data{number} {tmp_path}/data && exec "$@"'
    command[:] = ['unshare', '-m', 'sh', '-c', mount, 'sh', *command]
  if subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  with group(commands) as processes:
    outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert [p.returncode for p in processes] == [2, 2], outputs
  assert all('process 1 has train: contents=' in output for output in outputs), outputs


@long
def test_process_0_listens_where_it_was_told_to(tmp_path):
  with group(train_commands(2, 1, 'data=2', tmp_path, *ENDLESS)) as processes:
    port = int(next(word for word in processes[0].args if word.startswith('--coordinator')).rpartition(':')[2])
    wait_for_steps(tmp_path, processes)
    listening = []
    for table in ('/proc/net/tcp', '/proc/net/tcp6'):
      rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
      listening += [row[1] for row in rows if row[3] == '0A' and int(row[1].rpartition(':')[2], 16) == port]
  assert listening and all(set(row.partition(':')[0]) != {'0'} for row in listening), listening


@long
def test_when_one_is_frozen_the_others_stop_and_name_it(tmp_path):
  with group(train_commands(2, 1, 'data=2', tmp_path, *ENDLESS)) as processes:
    wait_for_steps(tmp_path, processes)
    processes[1].send_signal(signal.SIGSTOP)
    output = processes[0].communicate(timeout=60)[0]
  assert 'error: process 0: process 1 gives no sign since 20 seconds' in output and processes[0].returncode == 4


@long
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_all_save_the_same_step_when_one_is_told_to_stop(tmp_path, number):
  """The second process alone gets the signal; the resumed run equals one that was not stopped."""
  plain = ('--config.optimizer=sgd', '--config.sgd.schedule=constant')
  with group(train_commands(2, 1, 'data=2', tmp_path / 'parts', *ENDLESS, *plain)) as processes:
    wait_for_steps(tmp_path / 'parts', processes)
    processes[1].send_signal(number)
    outputs = [p.communicate(timeout=60)[0] for p in processes]
  assert [p.returncode for p in processes] == [75, 75], outputs
  saved = {int(re.search(r'told to stop: saved step (\d+) of', output)[1]) for output in outputs}
  assert len(saved) == 1
  steps = f'--config.steps={saved.pop() + 3}'
  run(2, 1, 'data=2', tmp_path / 'parts', *plain, steps)
  run(2, 1, 'data=2', tmp_path / 'whole', *plain, steps)
  assert (rows(tmp_path / 'parts') == rows(tmp_path / 'whole')).all()


@long
@pytest.mark.parametrize('layouts, kills, steps', [([ONE], 10, 300), ([TWO], 3, 150), ([ONE, TWO, FOUR], 5, 150)])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_were_not(tmp_path, layouts, kills, steps):
  """Bit for bit on one mesh, to 1e-6 on others; see scripts/kill.py and docs/reliability.txt for many more."""
  result = kill_often(tmp_path / 'runs', kills, layouts, steps)
  assert result.moments.total() >= kills and result.ends >= 1
  assert all(seconds < 60 for seconds in result.seconds)


@pytest.mark.long('0')
@pytest.mark.parametrize('wrong', [0, pytest.param(1, marks=long)])
def test_when_one_is_wrong_all_stop(tmp_path, wrong):
  """A mistake in the flags of one process, which the others cannot know."""
  own = {wrong: ['--config.mesh=data=3']}
  with group(train_commands(2, 1, 'data=2', tmp_path, *ENDLESS, own=own)) as processes:
    outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert [p.returncode for p in processes] == [2, 2], outputs
  assert all('process 1 has config.mesh=' in output for output in outputs), outputs


@pytest.mark.long
def test_when_one_does_not_come_the_others_give_up(tmp_path):
  """In one line, and not with the runtime's stack."""
  how = {'coordinator_address': f'localhost:{free_port()}', 'num_processes': 2, 'process_id': 0}
  code = f'from kronmesh.train.runtime import processes as p; p._BY_HAND = 2; p._initialize({how})'
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 4
  line = f'error: not all processes came to {how["coordinator_address"]} within 2 seconds; see what the others say'
  assert result.stderr.strip() == line


def test_half_of_the_flags_are_not_enough(tmp_path):
  result = commands.run('experiments/train.py', '--num_processes=2', f'--workdir={tmp_path}')
  assert result.returncode == 2
  assert (
    result.stderr.strip()
    == 'error: --coordinator_address and --process_id must be given too, to join processes by hand'
  )


@pytest.mark.skipif(not shutil.which('mpirun'), reason='no mpirun here: apt-get install openmpi-bin')
@long
def test_mpirun(tmp_path):
  command = ['scripts/launch/mpirun.sh', '2', *SMALL, *SHORT, f'--workdir={tmp_path}']
  root = {'OMPI_ALLOW_RUN_AS_ROOT': '1', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1'}
  env = {**os.environ, **root, 'PYTHON': sys.executable}
  result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('after 3 steps') == 1 and len(rows(tmp_path)) == 3
  assert json.loads((tmp_path / 'config.json').read_text())['mesh'] == 'data=-1'


@long
def test_slurm_is_found_by_its_environment(tmp_path):
  """As srun sets it for two tasks on one node."""
  slurm = {'SLURM_JOB_ID': str(free_port()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_NODES': '1'}
  slurm |= {'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2'}
  command = ['env', *(f'{k}={v}' for k, v in slurm.items())]
  own = [['SLURM_PROCID=0', 'SLURM_LOCALID=0'], ['SLURM_PROCID=1', 'SLURM_LOCALID=1']]
  train = [sys.executable, 'experiments/train.py', *SMALL, *SHORT, f'--workdir={tmp_path}']
  with group([[*command, *o, *train] for o in own]) as processes:
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), outputs
  assert len(rows(tmp_path)) == 3


def test_the_sbatch_file_is_a_script():
  script = (ROOT / 'scripts/launch/slurm.sbatch').read_text()
  assert '#SBATCH --ntasks-per-node=1' in script and 'srun' in script
  subprocess.run(['bash', '-n', 'scripts/launch/slurm.sbatch'], cwd=ROOT, check=True)
