"""Sweeps: what their text means, and members that are done, fail, are interrupted and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.configs import digits
from kronmesh.train.errors import ConfigError
from kronmesh.train.runtime.workdir import read_rows
from kronmesh.train.settings.overrides import apply, differences, flags_of, names_of, parse_sweep, resolved
from tests import commands
from tests.experiments.test_pages import opened
from tests.experiments.test_starting import HEED

ROOT = Path(__file__).parents[2]


def test_all_combinations_in_order():
  found = parse_sweep('optimizer.damping=1e-3,1e-2; seed=0..2', digits.get_config())
  assert found == [{'kfac.damping': d, 'seed': s} for d in (1e-3, 1e-2) for s in (0, 1, 2)]


def test_the_optimizers_own_section_is_that_of_the_member():
  found = parse_sweep('optimizer=sgd,adam;optimizer.learning_rate=1', digits.get_config())
  assert found == [
    {'optimizer': 'sgd', 'sgd.learning_rate': 1.0},
    {'optimizer': 'adam', 'adam.learning_rate': 1.0},
  ]


def test_values_have_the_types_of_the_config():
  found = parse_sweep('model.widths=(16, 8),[4,2],(3,);stop_at_target=True;mesh=data=8;steps=5', digits.get_config())
  assert [o['model.widths'] for o in found] == [(16, 8), (4, 2), (3,)]
  assert found[0] | {'model.widths': ()} == {'model.widths': (), 'stop_at_target': True, 'mesh': 'data=8', 'steps': 5}
  config = apply(digits.get_config(), found[1])
  assert config.model.widths == (4, 2) and config.steps == 5


WRONG = {
  'kfac.dampin=1': r"no key 'kfac.dampin'; did you mean 'kfac.damping'\?",
  'sed=1': r"no key 'sed'; did you mean 'seed'\?",
  'kfac.damping=x': 'kfac.damping=x: the config has 0.001 there, a float',
  'steps=1.5': 'the config has 100 there, a int',
  'stop_at_target=1': 'a bool',
  'kfac=1': "'kfac' is a section",
  'seed': 'is not key=value',
  'seed=': 'is not key=value',
  'seed=3..1': 'counts backwards',
  'seed=1;seed=2': 'given twice',
  ' ; ': 'is empty',
}


@pytest.mark.parametrize('text', WRONG)
def test_what_is_no_sweep(text):
  with pytest.raises(ConfigError, match=WRONG[text]):
    parse_sweep(text, digits.get_config())


def test_every_config_sweeps_what_it_has():
  config = digits.get_config()
  found = [resolved(o, config) for o in digits.sweep()]
  names = names_of(found)
  assert len(set(names)) == len(found) and all('/' not in n and len(n) < 100 for n in names)
  assert flags_of(found[0])[0] == '--config.optimizer=kfac'


def test_names_of_members_fit_a_file_system_and_differ():
  long = [{'data.source': 'x' * n, 'seed': 1} for n in (300, 301)]
  slashes = [{'data.source': name} for name in ('a/b', 'a_b', 'a b')]
  signs = [{'kfac.damping': 1e-3, 'adam.b1': 1e-3}, {'kfac.damping': 1e-2, 'adam.b1': 1e-3}]
  for found in (long, slashes, signs, [{'data.source': 'ü' * 200}, {'data.source': 'ö' * 200}]):
    names = names_of(found)
    assert len(set(names)) == len(found) and all(len(os.fsencode(name)) < 200 and '/' not in name for name in names)
  assert names_of([{'seed': 0}, {'seed': 1}]) == ['seed=0', 'seed=1'] and names_of([{}]) == ['only']


@pytest.mark.parametrize('text', ['seed=1,1', 'kfac.damping=1e-3,0.001', 'seed=0..2,1'])
def test_settings_that_are_written_twice(text):
  with pytest.raises(ConfigError, match=r'--sweep has (seed=1|kfac\.damping=0\.001) twice'):
    names_of(parse_sweep(text, digits.get_config()))


def test_flags_give_a_config_again():
  """Every setting that differs from the file's, of every type."""
  config = digits.get_config()
  changed = {
    'model.widths': (4, 2),
    'stop_at_target': True,
    'mesh': 'data=8',
    'kfac.damping': 0.5,
    'data.source': 'a b/c',
  }
  found = differences(apply(config, changed), config)
  assert found == changed and differences(config, config) == {}


SMALL = ['--config=experiments/configs/digits.py', '--config.model.widths=(16, 8)', '--config.data.batch_size=64']
SMALL += ['--config.steps=20', '--config.optimizer=sgd', '--config.devices=1', '--config.mesh=data=1']


def sweep_command(workdir, text, *more):
  return [sys.executable, 'experiments/sweep.py', *SMALL, f'--sweep={text}', f'--workdir={workdir}', *more]


def run_sweep(*args):
  return commands.run(*sweep_command(*args)[1:])


def states(workdir):
  return {m['name']: m['state'] for m in json.loads((workdir / 'sweep.json').read_text())['members']}


@pytest.mark.long
def test_members_that_fail_do_not_stop_others_and_a_second_call_goes_on(tmp_path, browser):
  workdir = tmp_path / 'sweep'
  done = run_sweep(workdir, 'data.batch_size=64,0;seed=0..1', '--workers=2')
  assert done.returncode == 3, done.stderr
  assert done.stderr.startswith('error: 2 of 4 members failed, first batch_size=0,seed=0: ')
  assert list(states(workdir).values()) == ['done', 'done', 'failed', 'failed']
  table = (workdir / 'table.txt').read_text()
  assert table in done.stdout + '\n' and table.splitlines()[0].split()[:3] == ['data.batch_size', 'seed', 'state']
  (best, *_) = (line.split() for line in table.splitlines()[2:])
  last = read_rows(workdir / 'members' / f'batch_size=64,seed={best[1]}' / 'metrics.jsonl')[-1]
  assert float(best[3]) == pytest.approx(last['eval_error'], rel=1e-3)
  # The second call trains what is missing, and nothing else.
  metrics = workdir / 'members' / 'batch_size=64,seed=0' / 'metrics.jsonl'
  before = metrics.stat().st_mtime_ns
  again = run_sweep(workdir, 'data.batch_size=64,0;seed=0..2', '--workers=2')
  assert again.returncode == 3 and metrics.stat().st_mtime_ns == before
  assert list(states(workdir).values()) == ['done'] * 3 + ['failed'] * 3
  for width in (1280, 390):
    run = opened(browser, workdir / 'sweep.html', width)
    assert 'sgd on digits: 6 settings' in run('return document.body.innerText')
    assert run('return [...document.querySelectorAll("td a")].length') == 3


@pytest.mark.long
def test_an_interrupted_sweep_saves_its_members_and_goes_on(tmp_path):
  # A shell's background jobs ignore the signal, and so would what they start.
  heed = 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])'
  command = sweep_command(tmp_path, 'seed=0..1', '--workers=2', '--config.steps=3000', '--config.eval_every=1000')
  first = subprocess.Popen(
    [sys.executable, '-c', heed, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  logs = [tmp_path / 'members' / f'seed={i}' / 'metrics.jsonl' for i in range(2)]
  end = time.monotonic() + 120
  while not all(log.exists() and '"step": 20,' in log.read_text() for log in logs):
    assert time.monotonic() < end and first.poll() is None
    time.sleep(0.1)
  os.kill(first.pid, signal.SIGINT)
  output = first.communicate(timeout=120)[0]
  assert first.returncode == 130, output
  assert set(states(tmp_path).values()) == {'stopped'}
  again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert again.returncode == 0, again.stderr
  for log in logs:
    steps = [row['step'] for row in read_rows(log) if 'loss' in row]
    assert steps == list(range(1, 3001))
    events = read_rows(log.parent / 'events.jsonl')
    assert [e['kind'] for e in events] == ['stopped', 'resumed']


FLAGS = {
  'a file of flags': (['--flagfile={tmp}/flags'], {'steps': 3}),
  'a flag that is negated': (['--config.stop_at_target', '--noconfig.stop_at_target'], {'stop_at_target': False}),
  'a bare flag': (['--config.stop_at_target', '--config.steps', '3'], {'stop_at_target': True, 'steps': 3}),
}


@pytest.mark.long
@pytest.mark.parametrize('name', FLAGS)
def test_members_have_the_settings_of_the_sweep(tmp_path, name):
  """However its flags were written, and from whichever folder it was called."""
  flags, expected = FLAGS[name]
  (tmp_path / 'flags').write_text('--config.steps=3\n')
  (tmp_path / 'own.py').write_text('from experiments.configs.digits import get_config\n')
  given = [flag.format(tmp=tmp_path) for flag in flags]
  own = [flag for flag in SMALL if 'steps' not in flag and '--config=' not in flag]
  command = [sys.executable, str(ROOT / 'experiments/sweep.py'), '--config=own.py', *own, '--config.steps=3', *given]
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
  done = subprocess.run(
    [*command, '--sweep=seed=0', '--workdir=out'], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env
  )
  assert done.returncode == 0, done.stderr + done.stdout
  config = json.loads((tmp_path / 'out/members/only/config.json').read_text())
  assert {key: config[key] for key in expected} == expected and config['model']['widths'] == [16, 8]


@pytest.mark.long
@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_members_do_not_outlive_their_sweep(tmp_path, number):
  command = sweep_command(tmp_path, 'seed=0', '--config.steps=100000', '--config.eval_every=100000')
  sweep = subprocess.Popen(
    [sys.executable, '-c', HEED, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  log = tmp_path / 'members/only/metrics.jsonl'
  end = time.monotonic() + 120
  while not (log.exists() and '"step": 20,' in log.read_text()):
    assert time.monotonic() < end and sweep.poll() is None
    time.sleep(0.1)
  holder = int((log.parent / '.lock').read_text().split()[1])
  sweep.send_signal(number)
  sweep.wait(60)
  end = time.monotonic() + 60
  while Path(f'/proc/{holder}').exists():
    assert time.monotonic() < end, 'the member lives on'
    time.sleep(0.1)
  assert read_rows(log.parent / 'events.jsonl')[-1]['kind'] == 'stopped'


@pytest.mark.long
def test_members_through_submitit(tmp_path):
  """Its own local executor runs the same job as Slurm would."""
  done = run_sweep(tmp_path, 'seed=0..1', '--cluster=local', '--slurm=timeout_min=5')
  assert done.returncode == 0, done.stdout + done.stderr
  assert set(states(tmp_path).values()) == {'done'} and (tmp_path / 'submitit').is_dir()
  wrong = run_sweep(tmp_path / 'wrong', 'seed=0', '--cluster=local', '--slurm=partitoin=gpu')
  assert wrong.returncode == 2 and 'partitoin' in wrong.stderr and 'Traceback' not in wrong.stderr, wrong.stderr


@pytest.mark.long
def test_gpus_are_one_for_each_worker(tmp_path):
  done = run_sweep(tmp_path / 'x', 'seed=0', '--workers=2', '--gpus=0')
  assert done.returncode == 2 and done.stderr == 'error: --gpus=0 is fewer than --workers=2\n'
  assert not (tmp_path / 'x').exists()
