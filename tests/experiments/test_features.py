"""What people expect of a trainer: each option against what it stands for."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import noise
from kronmesh import kron
from kronmesh.train import microbatches
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.planning.plan import plan, step_flops
from tests.experiments.small import built, losses, rows, small

long = pytest.mark.long


def trained(config, steps=4):
  """State and losses after some steps, statistics and inverses at each."""
  config.kfac.update({'statistics_every': 1, 'inverses_every': 1})
  run = built(config)
  state, found = run.init(0), []
  for number, batch in zip(range(steps), run.train_batches(0, 0), strict=False):
    state, metrics = run.step(state, batch, number)
    found.append(float(metrics['loss']))
  return run, jax.device_get(state._replace(key=jax.random.key_data(state.key))), found


def apart(a, b):
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(np.float64) for t in (a, b))
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.long('kfac-data=2')
@pytest.mark.parametrize(
  'optimizer, mesh',
  [
    ('kfac', 'data=2'),
    pytest.param('kfac', 'data=4,model=2', marks=long),
    *(pytest.param(n, 'data=8', marks=long) for n in ('sgd', 'kfac', 'ekfac')),
  ],
)
def test_microbatches_are_the_batch(optimizer, mesh):
  """Losses, parameters and factors; with the empirical Fisher, as drawn targets differ."""
  results = []
  for count in (1, 4):
    config = small(optimizer, mesh)
    config.microbatches = count
    if optimizer != 'sgd':
      config[optimizer].fisher = 'empirical'
    results.append(trained(config))
  (_, one, a), (_, four, b) = results
  np.testing.assert_allclose(a, b, rtol=1e-5)
  assert apart(four.params, one.params) < 1e-5
  if optimizer == 'kfac':
    factors = [kron.factors(s.opt_state) for s in (four, one)]
    assert apart(*factors) < 1e-5


def test_a_batch_that_does_not_divide_into_microbatches():
  config = small('sgd', 'data=8')
  config.microbatches = 3
  with pytest.raises(ConfigError, match=r'config.data.batch_size=64 does not divide into 3 microbatches of 8 shards'):
    build(config)


def test_microbatches_are_of_every_shard():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  x = jax.device_put(jnp.arange(16), sharding)
  parts = jax.jit(lambda x: microbatches.divide({'label': x}, 2, {'label': sharding})['label'])(x)
  np.testing.assert_array_equal(parts, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])


@pytest.mark.long('kfac-empirical')
@pytest.mark.parametrize(
  'optimizer, fisher',
  [('kfac', 'empirical'), pytest.param('kfac', 'sampled', marks=long), pytest.param('sgd', 'empirical', marks=long)],
)
def test_a_loss_scale_changes_nothing_in_float32(optimizer, fisher):
  results = []
  for scale in (0.0, 2.0**10):
    config = small(optimizer, 'data=1' if fisher == 'empirical' else 'data=8')
    config.kfac.fisher, config.recipe.loss_scale = fisher, scale
    results.append(trained(config))
  assert apart(results[1][1].params, results[0][1].params) < 1e-5
  np.testing.assert_allclose(results[1][2], results[0][2], rtol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [('float16', 0.01), pytest.param('bfloat16', 0.05, marks=long)])
@pytest.mark.long
def test_half_precision_trains_as_float32(tmp_path, dtype, tolerance):
  found = []
  for kind in ('float32', dtype):
    config = small('kfac', 'data=8', steps=12)
    config.model.dtype = kind
    config.recipe.loss_scale = 2.0**15 if kind == 'float16' else 0.0
    train(config, tmp_path / kind, quiet=True)
    found.append(losses(tmp_path / kind))
  np.testing.assert_allclose(*found, rtol=tolerance)
  assert found[0] != found[1]


@pytest.mark.long
def test_a_loss_scale_that_is_too_large_halves_and_loses_no_run(tmp_path):
  """2**40 times a gradient is beyond float16: steps are left out until it fits, and are no faults."""
  config = small('sgd', 'data=8', steps=60)
  config.model.dtype, config.recipe.loss_scale, config.eval_every = 'float16', 2.0**40, 60
  train(config, tmp_path, quiet=True)
  found = [row for row in rows(tmp_path) if 'loss' in row]
  scales = np.array([row['loss_scale'] for row in found])
  overflows = np.array([row['overflows'] for row in found])
  assert len(found) == 60 and overflows[-1] > 10 and (scales == 2.0**40 / 2.0**overflows).all()
  assert (np.diff(overflows)[-5:] == 0).all() and found[-1]['loss'] < found[0]['loss']
  kinds = {json.loads(line)['kind'] for line in (tmp_path / 'events.jsonl').read_text().splitlines()}
  assert kinds == {'warning'}


def test_the_loss_scale_doubles_after_many_sound_steps(monkeypatch):
  from kronmesh.train import guard

  monkeypatch.setattr(guard, '_GROWS_EVERY', 3)
  config = small('sgd', 'data=8')
  config.recipe.loss_scale = 4.0
  run = build(config)
  state, scales = run.init(0), []
  for number, batch in zip(range(7), run.train_batches(0, 0), strict=False):
    state, metrics = run.step(state, batch, number)
    scales.append(float(metrics['loss_scale']))
  assert scales == [4, 4, 8, 8, 8, 16, 16]


@pytest.mark.long
def test_clipping_by_the_norm_of_all_gradients():
  config = small('sgd', 'data=8')
  config.recipe.clip_norm = 0.5
  config.sgd.update({'momentum': 0.0, 'schedule': 'constant', 'learning_rate': 0.2})
  run = build(config)
  state = run.init(0)
  start = jax.device_get(state.params)
  batch = next(run.train_batches(0, 0))
  grads = jax.jit(jax.grad(lambda p: run.task.loss(p, {}, batch)[0]))(state.params)
  clipped, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
  expected = jax.tree.map(lambda p, g: p - 0.2 * g, start, clipped)
  assert float(optax.global_norm(grads)) > 0.5
  state, _ = run.step(state, batch, 0)
  assert apart(state.params, expected) < 1e-6


def test_averaged_parameters_are_what_is_evaluated():
  config = small('sgd', 'data=8')
  config.recipe.average = 0.8
  run = build(config)
  state = run.init(0)
  average = jax.device_get(state.params)
  for number, batch in zip(range(5), run.train_batches(0, 0), strict=False):
    state, _ = run.step(state, batch, number)
    decay = min(0.8, (1 + number) / (10 + number))
    average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, jax.device_get(state.params))
  assert apart(state.average, average) < 1e-6
  batch = next(run.eval_batches())
  expected = jax.jit(lambda p: run.task.loss(p, {}, batch, train=False)[1][0]['error'])(average)
  assert float(run.evaluate(state, batch)['error']) == pytest.approx(float(expected), rel=1e-5)


SMALLER = {
  'small_vit': {'model.layers': 2, 'model.width': 32, 'model.heads': 2},
  'small_gpt2': {'model.layers': 2, 'model.width': 32, 'model.heads': 2, 'data.shape': (16,)},
  'small_resnet': {'model.blocks': (1, 1), 'model.width': 4},
}


@long
@pytest.mark.parametrize('preset', SMALLER)
def test_activations_that_are_not_kept_are_computed_again(preset):
  """The program as written; XLA's CPU compiler merges what is computed twice, so that memory cannot be seen here."""
  products, results = {}, {}
  for keep in ('all', 'products', 'weights', 'blocks'):
    config = noise.get_config(preset)
    config.data.batch_size, config.kfac.subsample, config.model.keep = 8, 1.0, keep
    config.update_from_flattened_dict(SMALLER[preset])
    run = build(config)
    program = run.programs['gradient'].lower(run.init(0), next(run.train_batches(0, 0)), False)
    products[keep] = len(re.findall('stablehlo.(dot_general|convolution)', program.as_text()))
    _, state, found = trained(config, 2)
    results[keep] = found, kron.factors(state.opt_state)
  for keep in products:
    np.testing.assert_allclose(results[keep][0], results['all'][0], rtol=1e-4)
    assert apart(results[keep][1], results['all'][1]) < 1e-4
  if preset == 'small_resnet':
    assert products['blocks'] > products['products'] == products['all']
  else:
    assert products['blocks'] > products['weights'] > products['products'] == products['all']


def test_an_unknown_word_for_what_is_kept():
  config = noise.get_config('small_vit')
  config.model.keep = 'some'
  with pytest.raises(
    ConfigError, match=r"config.model: keep='some' is unknown; choose from all, blocks, products, weights"
  ):
    build(config)


@pytest.mark.long
def test_a_plan_traces_and_writes_nothing(tmp_path):
  config = small('kfac', 'data=4,model=2')
  config.model.widths, config.data.batch_size = (256, 128), 1024
  run = build(config)
  text = plan(run, tmp_path / 'run')
  assert '8 x cpu as data=4,model=2' in text and '1,024 examples a step' in text and 'A 65x65' in text
  assert not (tmp_path / 'run').exists()
  batch = next(run.train_batches(0, 0))
  # Forward and backward: at least three products of every kernel with the batch, less the first one's of inputs.
  kernels = [p.size for p in jax.tree.leaves(run.init(0).params) if p.ndim == 2]
  products = 2 * 1024 * (3 * sum(kernels) - 64 * 256)
  assert products <= step_flops(run, run.init(0), batch) <= 1.3 * products


@pytest.mark.long
def test_a_trace_of_some_steps(tmp_path):
  config = small('sgd', 'data=8', steps=6)
  train(config, tmp_path, quiet=True, profile='2:3')
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  for wrong in ('2', '5:3', 'a:b'):
    with pytest.raises(ConfigError, match=f'--profile={wrong} must be FIRST:LAST'):
      train(config, tmp_path, quiet=True, profile=wrong)


MISTAKES = {
  'average': ({'recipe.average': 1.0}, r'config.recipe.average=1 must be in \[0, 1\)'),
  'clip': ({'recipe.clip_norm': -1.0}, 'config.recipe.clip_norm=-1 must be at least 0'),
  'smoothing': ({'recipe.label_smoothing': 1.5}, 'label_smoothing=1.5'),
  'natural': ({'optimizer': 'natural_gradient', 'microbatches': 2}, 'does not work with'),
  'model': ({'model.widths': (16, 0)}, 'config.model'),
  'dtype': ({'model.dtype': 'float17'}, "config.model.dtype='float17' is unknown"),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_options_that_cannot_be(name):
  changes, words = MISTAKES[name]
  config = small('sgd', 'data=8')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=words):
    build(config)
