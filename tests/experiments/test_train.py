"""The training loop: sharded equals unsharded, resumed equals uninterrupted, mistakes end in one line."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import digits_classifier
from kronmesh import kron
from kronmesh.data import DataError
from kronmesh.parallel import MeshError
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.loop import train
from kronmesh.train.optimizers import MISSING, OPTIMIZERS, SECOND_ORDER
from kronmesh.train.runtime.launch import guarded
from tests import commands
from tests.data.idx import write_idx
from tests.experiments.small import build_on, built, losses, small

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_trainer_takes_the_steps_of_kfac_itself():
  """With intervals of 1: `kron.kfac` with all inside of one step, at the config's settings."""
  config = small(mesh='data=1')
  config.kfac.update(
    {'inverses_every': 1, 'statistics_every': 1, 'schedule': 'constant', 'damping': 0.03, 'decay': 0.8}
  )
  run = built(config)
  own, curvature = config.kfac, run.curvature
  settings = {'damping': 0.03, 'decay': 0.8, 'momentum': own.momentum, 'kl_clip': own.kl_clip}
  tx = kron.kfac(own.learning_rate, curvature, **settings, placement=run.placement)
  state = run.init(0)
  params = jax.tree.map(jnp.copy, state.params)
  key, opt_state = jnp.copy(state.key), tx.init(params)

  @jax.jit
  def step(params, opt_state, batch, key):
    _, grads, stats = curvature.value_and_grad(params, {}, batch, key=key)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state

  for number, batch in enumerate(b for b, _ in zip(run.train_batches(0, 0), range(3), strict=False)):
    params, opt_state = step(params, opt_state, batch, jax.random.fold_in(key, number))
    state, _ = run.step(state, batch, number)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, params)


def five_steps(mesh, devices):
  """Losses, the way the parameters went, and the factors after five steps at damping 1e-2."""
  config = small(mesh=mesh)
  run = build_on(config, devices)
  state = run.init(0)
  start, losses = jax.device_get(state.params), []
  for batch in (b for b, _ in zip(run.train_batches(0, 0), range(5), strict=False)):
    state, metrics = run.step(state, batch, 0)
    losses.append(float(metrics['loss']))
  way = jax.tree.map(np.subtract, jax.device_get(state.params), start)
  return losses, way, kron.factors(jax.device_get(state.opt_state))


@pytest.fixture(scope='module')
def one_device():
  return five_steps('data=1', jax.devices()[:1])


@pytest.mark.long
@pytest.mark.parametrize('mesh', ['data=8', 'data=4,model=2', 'data=2,model=4', 'data=4,fsdp=2'])
def test_eight_devices_equal_one(mesh, one_device):
  for a, b in zip(five_steps(mesh, jax.devices()), one_device, strict=True):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


COLLECTIVES = {
  'psum': ('data=8', {}),
  'ring': ('data=8', {'bucket_mb': 1e-4}),
  'hierarchical': ('data=4,fsdp=2', {}),
  'torus': ('data=4,fsdp=2', {}),
}


@pytest.mark.long
@pytest.mark.parametrize('method', COLLECTIVES)
@pytest.mark.parametrize('optimizer', ['kfac', 'stale_kfac'])
def test_own_collectives_train_as_the_compilers_do(tmp_path, method, optimizer):
  """The empirical Fisher, whose targets are not drawn by shard; without batch norm the losses are the same."""
  results = []
  for name in ('auto', method):
    config = small(optimizer, mesh=COLLECTIVES[method][0])
    config[optimizer].fisher = 'empirical'
    config.gradients.all_reduce = name
    config.gradients.update(COLLECTIVES[method][1])
    train(config, tmp_path / name, quiet=True)
    results.append(losses(tmp_path / name))
  np.testing.assert_allclose(*results, rtol=1e-4)


@pytest.mark.long
def test_own_collectives_in_half_precision_and_without_second_order(tmp_path):
  results = []
  for half in ('', 'bfloat16'):
    config = small('sgd', mesh='data=4,fsdp=2')
    config.gradients.update({'all_reduce': 'torus', 'half': half})
    train(config, tmp_path / f'half{half}', quiet=True)
    results.append(losses(tmp_path / f'half{half}'))
  np.testing.assert_allclose(*results, rtol=1e-2)
  assert results[0] != results[1]


@pytest.mark.long
def test_blocks_of_a_config(tmp_path):
  config = small(mesh='data=4,model=2', steps=1)
  config.placement.blocks = True
  train(config, tmp_path, quiet=True)
  assert '2 blocks of' in (tmp_path / 'coverage.txt').read_text()


@pytest.mark.brief('sgd')
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimiser_trains_on_the_mesh(tmp_path, optimizer):
  rows = train(small(optimizer, steps=9), tmp_path, quiet=True)
  assert rows[-1]['eval_error'] < rows[0]['eval_error']
  assert (tmp_path / 'coverage.txt').exists() == (optimizer in SECOND_ORDER)
  logged = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  told = {
    'kfac': {'clip'},
    'stale_kfac': {'refreshes_saved'},
    'adaptive_kfac': {'clip', 'damping', 'learning_rate', 'momentum'},
  }
  assert told.get(optimizer, set()) <= set(logged)


@pytest.mark.long
def test_the_clip_of_a_config_reaches_adaptive_kfac(tmp_path):
  config = small('adaptive_kfac', steps=1)
  config.adaptive_kfac.kl_clip = 1e-3
  train(config, tmp_path, quiet=True)
  assert json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])['clip'] < 1


@pytest.mark.parametrize('optimizer', MISSING)
def test_optimisers_that_no_package_has_are_named(optimizer):
  with pytest.raises(ConfigError, match=f"'{optimizer}' cannot run: .+"):
    build(small(optimizer))


MISTAKES = {
  'collective': ({'gradients.all_reduce': 'tree'}, ConfigError, "all_reduce='tree' is unknown"),
  'collective mesh': ({'gradients.all_reduce': 'ring'}, ConfigError, 'is for meshes of data and fsdp'),
  'torus': ({'gradients.all_reduce': 'torus', 'mesh': 'data=8'}, ConfigError, 'runs along two mesh axes'),
  'half': ({'gradients.half': 'bfloat16'}, ConfigError, 'choose config.gradients.all_reduce too'),
  'inverses': ({'placement.inverses': 'group'}, MeshError, "inverses='group' is unknown"),
  'statistics': ({'placement.statistics': 'int8'}, MeshError, "statistics='int8' is unknown"),
  'mesh': ({'mesh': 'data=3'}, MeshError, 'does not match the 8 devices'),
  'axis': ({'mesh': 'date=8'}, MeshError, "axis 'date' is unknown"),
  'batch': ({'data.batch_size': 66}, MeshError, 'batch_size=66 does not divide'),
  'optimizer': ({'optimizer': 'lbfgs'}, ConfigError, "'lbfgs' is unknown"),
  'task': ({'task': 'dream'}, ConfigError, "'dream' is unknown"),
  'model': ({'model.name': 'gpt'}, ConfigError, "'gpt' is unknown"),
  'steps': ({'steps': 0}, ConfigError, 'at least 1'),
  'intervals': ({'kfac.inverses_every': 0}, ConfigError, 'kfac.inverses_every=0 must be at least 1'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_in_a_config_show_before_anything_is_written(tmp_path, name):
  changes, kind, words = MISTAKES[name]
  config = small()
  config.update_from_flattened_dict(changes)
  with pytest.raises(kind) as error:
    train(config, tmp_path / 'run', quiet=True)
  assert words in str(error.value) and '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_folder_belongs_to_one_config(tmp_path):
  train(small('sgd', steps=3), tmp_path, quiet=True)
  with pytest.raises(ConfigError, match='another optimizer'):
    train(small('adam', steps=3), tmp_path, quiet=True)


def command(*args, **env):
  return commands.run(*args, env=env)


COMMANDS = {
  'a typo in a key': (['--config.optimiser=adam'], "no key 'optimiser'; did you mean 'optimizer'?"),
  'a typo in a section': (['--config.kfac.dampin=1'], "no key 'kfac.dampin'; did you mean 'damping'?"),
  'an argument no config takes': (['--config=experiments/configs/digits.py:big'], 'get_config() takes'),
  'a wrong type': (['--config.steps=many'], 'steps'),
  'a wrong mesh': (['--config.mesh=data=3'], 'does not match the 8 devices'),
  'a missing data set': (
    ['--config.data.name=fashion_mnist', '--config.data.source=/nowhere'],
    'no IDX files in /nowhere',
  ),
  'an unknown flag': (['--wordkir=x'], 'wordkir'),
  'a stray word': (['adam'], "'adam' is not a flag"),
}


@pytest.mark.long('a stray word', 'a typo in a key', 'an argument no config takes')
@pytest.mark.parametrize('name', COMMANDS)
def test_mistakes_on_the_command_line_end_in_one_line(tmp_path, name):
  args, words = COMMANDS[name]
  done = command(
    'experiments/train.py', '--config=experiments/configs/digits.py', f'--workdir={tmp_path}', *args,
    KRONMESH_DATA=str(tmp_path / 'data') if 'missing' in name else os.environ.get('KRONMESH_DATA', ''),
  )  # fmt: skip
  lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.long
def test_digits_are_the_default_config():
  done = command('experiments/train.py', '--config.mesh=data=3')
  assert done.returncode == 2 and 'does not match the 8 devices' in done.stderr, done.stderr


@pytest.mark.long
def test_a_missing_config_is_named():
  done = command('experiments/train.py', '--config=experiments/configs/nothing.py')
  assert done.returncode == 2 and 'nothing.py' in done.stderr and 'Traceback' not in done.stderr, done.stderr


CONFIGS = {
  'digits_classifier': {'model.hidden': (8,), 'data.batch_size': 128},
  'fashion_mnist_autoencoder': {'model.widths': (16, 8), 'data.batch_size': 64},
  'fashion_mnist_resnet': {'model.blocks': (1, 1), 'model.width': 4, 'data.batch_size': 16, 'kfac.subsample': 1.0},
  'fashion_mnist_mlp': {'model.hidden': (8,), 'data.batch_size': 64},
  'text_transformer': {'model.layers': 1, 'model.width': 16, 'model.heads': 2, 'data.batch_size': 16},
  'noise': {'model.blocks': (1, 1), 'model.width': 4, 'data.shape': (32, 32, 3), 'data.batch_size': 64},
  'poisson': {'model.hidden': (8,), 'data.batch_size': 64},
  'moving_fashion_mnist': {'model.blocks': (1, 1), 'model.width': 4, 'data.batch_size': 16, 'kfac.subsample': 1.0},
  'accidents': {'model.blocks': (1, 1), 'model.width': 4, 'data.batch_size': 8, 'kfac.subsample': 1.0},
  'anomalies': {'model.blocks': (1, 1), 'model.width': 4, 'data.batch_size': 8, 'kfac.subsample': 1.0},
  'videos': {
    'model.blocks': (1, 1),
    'model.width': 4,
    'model.stem': 'small',
    'model.classes': 2,
    'data.batch_size': 8,
    'data.image_size': 16,
    'data.frames': 4,
    'data.short_side': 24,
    'kfac.subsample': 1.0,
  },
  'resolution': {
    'mesh': 'space=8',
    'model.blocks': (1,),
    'model.width': 4,
    'model.classes': 4,
    'data.shape': (2, 36, 20, 3),
  },
  'imagenet_resnet50': {
    'model.blocks': (1, 1),
    'model.width': 4,
    'data.batch_size': 8,
    'data.image_size': 32,
    'kfac.subsample': 1.0,
  },
}


@pytest.mark.long
@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_trains_in_small(tmp_path, name, request):
  config = importlib.import_module(f'experiments.configs.{name}').get_config()
  config.update_from_flattened_dict({**CONFIGS[name], 'steps': 3, 'eval_every': 3, 'data.eval_examples': 64})
  config.data.eval_batch_size = 64
  section = config[config.optimizer]
  section.warmup_steps = min(section.warmup_steps, 1)
  if config.data.name == 'imagenet2012':
    config.data.folder = request.getfixturevalue('imagenet_folder')
  if config.data.name == 'moving_fashion_mnist':
    config.data.folder = request.getfixturevalue('moving_folder')
  if name in ('accidents', 'anomalies'):
    config.data.folder = request.getfixturevalue('scene_folder')
  if name == 'videos':
    config.data.update(
      {'name': 'video_folder', 'source': request.getfixturevalue('video_folder'), 'folder': str(tmp_path / 'data')}
    )
  if config.data.name == 'fashion_mnist':
    write_idx(tmp_path / 'idx', packed=True, train=64, test=20)
    config.data.folder, config.data.source = str(tmp_path / 'data'), str(tmp_path / 'idx')
  row = train(config, tmp_path / 'run', quiet=True)[-1]
  assert row['step'] == 3 and np.isfinite(row['eval_loss'])


ENDINGS = {
  'a config': (ConfigError('a'), 2),
  'a mesh': (MeshError('a'), 2),
  'data': (DataError('a'), 2),
  'a loss': (kron.CurvatureError('a'), 2),
  'a run': (RunError('a'), 3),
  'Ctrl-C': (KeyboardInterrupt(), 130),
}


@pytest.mark.parametrize('name', ENDINGS)
def test_every_known_error_ends_in_one_line_and_a_code(name, capsys, monkeypatch):
  error, code = ENDINGS[name]
  commands.stay(monkeypatch)

  def run(argv):
    raise error

  with pytest.raises(SystemExit) as ended:
    guarded(run)(['train.py'])
  printed = capsys.readouterr().err
  assert ended.value.code == code and printed.startswith('error: ') and printed.count('\n') == 1


@pytest.mark.long
def test_ctrl_c_and_the_same_command_again(tmp_path):
  args = ['experiments/train.py', '--config=experiments/configs/digits.py', '--config.model.widths=(16,8)']
  args += ['--config.steps=40', '--config.checkpoint_every=10', f'--workdir={tmp_path}']
  # A shell's background jobs ignore the signal, and so would what they start.
  heed = 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
  heed += 'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
  first = subprocess.Popen(
    [sys.executable, '-c', heed, *args, '--config.steps=4000'], cwd=ROOT, stderr=subprocess.PIPE, text=True
  )
  try:
    wait_until(lambda: (tmp_path / 'checkpoints' / '10').exists(), 120)
    first.send_signal(signal.SIGINT)
    _, printed = first.communicate(timeout=120)
  finally:
    first.kill()
  assert first.returncode == 130 and printed.splitlines()[-1].startswith('error: interrupted'), printed
  assert 'Traceback' not in printed
  again = command(*args)
  assert again.returncode == 0, again.stderr
  steps = [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert sorted(set(steps)) == list(range(1, max(steps) + 1)) and max(steps) >= 40


def wait_until(condition, seconds):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f'nothing after {seconds} s'
    time.sleep(0.2)


@pytest.mark.long
def test_compare_writes_its_table_and_pictures(tmp_path):
  args = ['experiments/compare.py', '--config=experiments/configs/digits.py', f'--workdir={tmp_path}', '--seeds=2']
  args += ['--config.model.widths=(16,8)', '--config.steps=20', '--config.target=9.0', '--optimizers=kfac,adam']
  done = command(*args)
  assert done.returncode == 0, done.stderr
  for name in ('table.txt', 'compare.json', 'curves.png', 'reconstructions.png'):
    assert (tmp_path / name).stat().st_size > 100
  assert 'kfac' in done.stdout and 'adam' in done.stdout
  table = (tmp_path / 'table.txt').read_text()
  again = command(*args)
  assert again.returncode == 0 and table in again.stdout
  assert 'step' not in again.stdout.split(table)[0], 'a second run trains nothing'


@pytest.mark.long
def test_compare_tunes_every_member_alike_and_batches_plots(tmp_path):
  small = ['--config=experiments/configs/poisson.py', '--config.model.hidden=(8,)', '--config.target=0.9', '--trials=2']
  small += ['--seeds=1', '--config.data.batch_size=64', '--optimizers=kfac,adam:steps=6,soap', '--targets=0.8']
  args = [
    'experiments/compare.py',
    *small,
    '--config.steps=4',
    '--config.eval_every=2',
    f'--workdir={tmp_path}/compare',
  ]
  done = command(*args)
  assert done.returncode == 0, done.stderr
  assert 'soap: not run: ' in done.stdout and 'steps to error 0.8' in done.stdout
  trials = [json.loads(line)['trial'] for line in (tmp_path / 'compare' / 'trials.jsonl').read_text().splitlines()]
  assert [t['optimizer'] for t in trials] == ['kfac', 'kfac', 'adam', 'adam']
  assert all(t['steps'] == 6 for t in trials[2:])
  results = json.loads((tmp_path / 'compare' / 'compare.json').read_text())['results']
  assert [len(r['curves'][0]) for r in results] == [2, 3] and all(r['chosen'] in trials for r in results)
  assert command(*args).returncode == 0
  args = ['scripts/batches.py', *small, '--examples=256', '--batches=64,128', f'--workdir={tmp_path}/batches']
  done = command(*[a for a in args if 'soap' not in a and '--targets' not in a], '--optimizers=kfac,adam')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'batches' / 'batches.png').stat().st_size > 1000
  assert 'batch 128' in (tmp_path / 'batches' / 'table.txt').read_text()


@pytest.mark.long
def test_the_classifier_learns(tmp_path):
  rows = train(digits_classifier.get_config(), tmp_path, quiet=True)
  assert rows[-1]['eval_accuracy'] > 0.95
