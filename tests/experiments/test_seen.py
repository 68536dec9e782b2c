"""What can be seen of a run: rows by layer and by time, event files, Weights & Biases."""

import json
import sys

import jax
import numpy as np
import pytest

from kronmesh import kron
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.reporting.meter import PARTS, Meter
from tests.experiments.small import built, rows, small


@pytest.mark.brief('sgd')
@pytest.mark.parametrize(
  'optimizer',
  ['kfac', 'sgd', *(pytest.param(n, marks=pytest.mark.long) for n in ('stale_kfac', 'adaptive_kfac', 'ekfac'))],
)
def test_rows_by_layer(tmp_path, optimizer):
  config = small(optimizer, steps=9)
  config.health_every = 4
  run, states = build(config), {}

  def step(state, batch, number):
    before = jax.device_get(state.params)
    state, metrics = run.step(state, batch, number)
    states[number + 1] = before, jax.device_get(state.params), jax.device_get(metrics)
    return state, metrics

  train(config, tmp_path, quiet=True, run=run._replace(step=step))
  found = [json.loads(line) for line in (tmp_path / 'layers.jsonl').read_text().splitlines()]
  # The first look, the first ones at or after each fourth step, and the last.
  assert [row['step'] for row in found] == [3, 6, 9]
  for row in found:
    before, after, metrics = states[row['step']]
    names = kron.param_names(before)
    assert list(row['layers']) == names
    way = [np.linalg.norm(a - b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)]
    np.testing.assert_allclose([row['layers'][n]['update_norm'] for n in names], way, rtol=1e-4)
    np.testing.assert_allclose([row['layers'][n]['gradient_norm'] for n in names], metrics['gradient_norms'], rtol=1e-6)
    kernel = row['layers']['layer_0/kernel']
    if optimizer in ('sgd', 'ekfac'):
      assert set(kernel) == {'gradient_norm', 'update_norm'}
    else:
      assert kernel['condition_A'] > 1 and kernel['damping_G'] > 0 and kernel['refresh_interval'] >= 1
      assert {'condition_G', 'damping_A', 'largest_A', 'largest_G'} <= set(kernel)


@pytest.mark.long
def test_event_files(tmp_path):
  """Read by the package's own protocol buffers: no TensorFlow."""
  from tensorboardX.proto.event_pb2 import Event

  config = small('kfac', 'data=1', steps=6)
  train(config, tmp_path, quiet=True, run=built(config))
  (path,) = (tmp_path / 'tensorboard').iterdir()
  data, scalars = path.read_bytes(), {}
  while data:
    size = int.from_bytes(data[:8], 'little')
    event = Event.FromString(data[12 : 12 + size])
    for value in event.summary.value:
      scalars[value.tag, event.step] = value.simple_value
    data = data[12 + size + 4 :]
  logged = {row['step']: row for row in rows(tmp_path) if 'loss' in row}
  scores = {row['step']: row for row in rows(tmp_path) if 'seconds' in row}
  for step in (3, 6):
    assert scalars['train/loss', step] == pytest.approx(logged[step]['loss'])
    assert scalars['eval/error', step] == pytest.approx(scores[step]['eval_error'])
  assert scalars['layers/layer_0/kernel/condition_A', 3] > 1
  assert ('time/examples_per_second', 6) in scalars


@pytest.mark.long
def test_event_files_can_be_left_out(tmp_path):
  config = small('sgd', steps=3)
  config.writers.tensorboard = False
  train(config, tmp_path, quiet=True)
  assert not (tmp_path / 'tensorboard').exists()


def test_weights_and_biases_is_named_where_it_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  config = small('sgd', steps=3)
  config.writers.wandb = 'project'
  with pytest.raises(ConfigError, match='needs the package wandb: pip install wandb'):
    train(config, tmp_path, quiet=True)


def _records(data):
  """Of LevelDB's log format, behind a header of 7 bytes: chunks of (checksum, length, kind) in blocks of 32 KB."""
  at, whole = 7, b''
  while at + 7 <= len(data):
    if 2**15 - at % 2**15 < 7:
      at += 2**15 - at % 2**15
    size, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last of several
      yield whole
      whole = b''


@pytest.fixture
def new_wandb():
  """The package reads its environment once in a process, until this."""
  import wandb

  wandb.teardown()
  yield
  wandb.teardown()


@pytest.mark.long
def test_weights_and_biases_does_not_know_the_user(tmp_path, monkeypatch, new_wandb):
  for name in ('WANDB_API_KEY', 'WANDB_MODE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
  config = small('sgd', steps=3)
  config.writers.wandb = 'project'
  with pytest.raises(ConfigError, match='Or set WANDB_MODE=offline'):
    train(config, tmp_path / 'run', quiet=True)
  assert not (tmp_path / 'run').exists()


@pytest.mark.long
def test_weights_and_biases_gets_what_the_rows_have(tmp_path, monkeypatch, new_wandb):
  """The package itself, without a network."""
  from wandb.proto.wandb_internal_pb2 import Record

  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  config = small('sgd', steps=3)
  config.writers.wandb = 'project'
  train(config, tmp_path / 'run', quiet=True)
  (path,) = (tmp_path / 'run' / 'wandb').glob('offline-run-*/run-*.wandb')
  logged = {}
  for record in map(Record.FromString, _records(path.read_bytes())):
    logged |= {'/'.join(item.nested_key) or item.key: item.value_json for item in record.history.item}
  (row,) = (row for row in rows(tmp_path / 'run') if 'seconds' in row)
  assert json.loads(logged['eval/error']) == pytest.approx(row['eval_error'])
  assert float(logged['train/loss']) > 0 and '/run-run-' in str(path)


def test_times_by_part(monkeypatch):
  clock = iter([0, 1, 3, 10, 12, 13, 20.0])
  monkeypatch.setattr('kronmesh.train.reporting.meter.time.perf_counter', lambda: next(clock))
  meter = Meter(batch_size=8)  # at 0
  with meter.of('input'):  # 1 to 3
    pass
  row = meter.row(5)  # at 10: 8 s are compute's
  assert {k: row[f'{k}_seconds'] for k in PARTS} == {'input': 2, 'compute': 8, 'evaluation': 0, 'checkpoint': 0}
  assert 'examples_per_second' not in row  # compilation is in there
  meter.flops_share = 0.25
  with meter.of('evaluation'):  # 12 to 13
    pass
  row = meter.row(9)  # at 20: 9 s are compute's, for 4 steps
  assert row['compute_seconds'] == 17 and row['evaluation_seconds'] == 1
  assert row['examples_per_second'] == round(8 * 4 / 9, 2) and row['mfu'] == round(0.25 * 4 / 9, 4)


def test_a_run_tells_its_rate(tmp_path, capsys):
  config = small('sgd', steps=18)
  train(config, tmp_path)
  times = [row for row in rows(tmp_path) if 'compute_seconds' in row]
  assert [row['step'] for row in times] == [3, 6, 9, 10, 12, 15, 18] and times[-1]['examples_per_second'] > 0
  assert 0 < times[-1]['mfu'] < 1 and 'examples/s' in capsys.readouterr().out


@pytest.mark.long
def test_the_host_waits_for_the_device_at_looks_alone(tmp_path, monkeypatch):
  """Between them nothing reads an array: neither metrics nor state."""
  ArrayImpl = type(jax.numpy.zeros(()))
  config = small('kfac', 'data=2', steps=60)  # one device's arrays can be read without these two
  config.log_every, config.eval_every, config.health_every, config.keep_checkpoints = 20, 60, 0, 0
  run, reads, at = built(config), [], [0]
  value = ArrayImpl._value.fget

  def step(state, batch, number):
    at[0] = number
    return run.step(state, batch, number)

  def read(array):
    reads.append(at[0])
    return value(array)

  monkeypatch.setattr(ArrayImpl, '_value', property(read))
  monkeypatch.setattr(ArrayImpl, '__array__', lambda self, *args, **kwargs: np.asarray(read(self), *args, **kwargs))
  train(config, tmp_path, quiet=True, run=run._replace(step=step))
  assert {n for n in reads if n > 0} == {19, 39, 59}


@pytest.mark.long
def test_what_the_loop_adds_is_measured():
  """The script, in small: what is outside of steps and batches, less what a bare loop has there."""
  from scripts.loop import Timed, measure

  config = small('sgd', 'data=8')
  config.log_every = 5
  found = measure(config, 50, 1)
  assert -0.5 < found['added'] < 5 and found['steps'] == 50 and len(found['each']) == 1
  timed = Timed(build(config), 10)
  timed.began, timed.ended, timed.inside = 1.0, 4.0, 2.0
  assert timed.outside == 0.5
