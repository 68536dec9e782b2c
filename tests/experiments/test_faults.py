"""Faults: the step that is not sound changes nothing, is looked into exactly, and the policy decides."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.faults import _outputs
from kronmesh.train.guard import norms
from kronmesh.train.loop import train
from tests.experiments.small import built, losses, small, steps_of


def poisoned(run, at, values):
  """The run with one value of the batches of these numbers replaced."""

  def batches(seed, start):
    for number, batch in enumerate(run.train_batches(seed, start), start):
      if number in at:
        batch = {**batch, 'inputs': batch['inputs'].at[0].set(values)}
      yield batch

  return run._replace(train_batches=batches)


def without(run, left_out):
  """The run whose data lacks these batches."""

  def batches(seed, start):
    for number, batch in enumerate(run.train_batches(seed, 0)):
      if number not in left_out:
        yield batch

  return run._replace(train_batches=batches)


def events(folder):
  return [json.loads(line) for line in (folder / 'events.jsonl').read_text().splitlines()]


def config_of(optimizer='sgd', steps=9, **faults):
  config = small(optimizer, mesh='data=8', steps=steps)
  config[optimizer].schedule = 'constant'
  config.faults.update(faults)
  return config


def test_by_the_policy_stop_a_batch_that_is_not_finite_ends_the_run(tmp_path):
  config = config_of(not_finite='stop')
  with pytest.raises(RunError, match=r'step 2: the batch holds values that are not finite; mend the data set$'):
    train(config, tmp_path, quiet=True, run=poisoned(build(config), [1], np.nan))
  assert steps_of(tmp_path) == [1]


@pytest.mark.long('kfac')
@pytest.mark.parametrize('optimizer', ['kfac', 'sgd'])
def test_a_step_that_is_skipped_leaves_the_run_as_if_its_batch_were_not_there(tmp_path, optimizer):
  """Parameters, momentum, factors: bit for bit. K-FAC's schedule of refreshes and keys go by the step, which counts on,
  so that it runs with intervals of 1 and the empirical Fisher."""
  config = config_of(optimizer)
  if optimizer == 'kfac':
    config.kfac.update({'statistics_every': 1, 'inverses_every': 1, 'fisher': 'empirical'})
    config.mesh = 'data=1'
  run = built(config)
  train(config, tmp_path / 'skipped', quiet=True, run=poisoned(run, [4], np.nan))
  shorter = config.copy_and_resolve_references()
  shorter.steps = 8
  train(shorter, tmp_path / 'without', quiet=True, run=without(run, [4]))
  assert losses(tmp_path / 'skipped') == losses(tmp_path / 'without')
  (event,) = events(tmp_path / 'skipped')
  assert (event['step'], event['policy'], event['batch'], event['fault']) == (5, 'skip', 4, 'not_finite')
  assert 'step 5 is left out' in event['words']


def test_too_many_in_a_row_end_the_run_and_those_apart_do_not(tmp_path):
  config = config_of(limit=2)
  run = build(config)
  train(config, tmp_path / 'apart', quiet=True, run=poisoned(run, [1, 2, 4, 5, 7], np.nan))
  assert len(losses(tmp_path / 'apart')) == 4
  with pytest.raises(RunError, match=r'step 4: .+ \(3 steps in a row; config.faults.limit=2\)'):
    train(config, tmp_path / 'row', quiet=True, run=poisoned(run, [1, 2, 3], np.nan))


@pytest.mark.long
def test_a_rollback_returns_to_the_checkpoint_and_goes_on_with_later_data(tmp_path):
  config = config_of(not_finite='rollback')
  config.checkpoint_every = 3
  run = build(config)
  train(config, tmp_path / 'back', quiet=True, run=poisoned(run, [4], np.nan))
  # Batches 3 and 4 are those since the checkpoint of step 3.
  train(config, tmp_path / 'without', quiet=True, run=without(run, [3, 4]))
  assert losses(tmp_path / 'back') == losses(tmp_path / 'without')
  assert steps_of(tmp_path / 'back') == list(range(1, 10))
  assert 'back to step 3' in events(tmp_path / 'back')[0]['words']


@pytest.mark.long
def test_the_data_of_a_rollback_is_kept_by_a_checkpoint(tmp_path):
  config = config_of(not_finite='rollback', steps=6)
  config.checkpoint_every = 3
  run = poisoned(build(config), [4], np.nan)
  train(config, tmp_path / 'parts', quiet=True, run=run)
  longer = config.copy_and_resolve_references()
  longer.steps = 9
  train(longer, tmp_path / 'parts', quiet=True, run=run)
  train(longer, tmp_path / 'whole', quiet=True, run=run)
  assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole')


def test_a_rollback_that_leads_nowhere_ends(tmp_path):
  config = config_of(not_finite='rollback', limit=2)
  with pytest.raises(RunError, match='3 times from the checkpoint of step 0'):
    train(config, tmp_path, quiet=True, run=poisoned(build(config), range(2, 99), np.nan))


@pytest.mark.long
def test_a_spike_is_found_and_its_layer_named(tmp_path):
  config = config_of(spike='skip', steps=30)
  config.sgd.learning_rate = 1e-4
  run = build(config)
  train(config, tmp_path, quiet=True, run=poisoned(run, [25], 1e3))
  (event,) = events(tmp_path)
  assert event['step'] == 26 and event['fault'] == 'spike' and 'far above its mean' in event['words']
  # The parameters hardly move, so that gradients there are those at the start.
  state, gradient = run.init(0), jax.jit(jax.grad(lambda p, batch: run.task.loss(p, {}, batch)[0]))
  usual, spike = (next(poisoned(run, at, 1e3).train_batches(0, 25)) for at in ([], [25]))
  usual, spike = (norms(gradient(state.params, batch)) for batch in (usual, spike))
  growth = np.asarray(spike / usual)
  worst = kron.param_names(state.params)[growth.argmax()]
  name, times = re.search(r"the gradient of '(.+)' is (.+) times its usual", event['words']).groups()
  assert name == worst and float(times) == pytest.approx(growth.max(), rel=0.3)
  ignored = config_of(spike='ignore', steps=30)
  train(ignored, tmp_path / 'ignored', quiet=True, run=poisoned(build(ignored), [25], 1e3))
  assert not (tmp_path / 'ignored' / 'events.jsonl').exists()


@pytest.mark.long
def test_raised_damping_acts_at_once_and_relaxes(tmp_path):
  config = config_of('kfac', not_finite='damp', steps=9)
  run = poisoned(build(config), [4], np.nan)
  seen = []

  def step(state, batch, number):
    seen.append((float(state.guard.caution), jax.device_get(state.opt_state)))
    return run.step(state, batch, number)

  train(config, tmp_path, quiet=True, run=run._replace(step=step))
  cautions = [caution for caution, _ in seen]
  # Step 5 is held and step 6 waits, until the host looks after step 6; it goes on with step 6.
  assert cautions[:6] == [1] * 6
  np.testing.assert_allclose(cautions[6:9], [10, 1 + 9 * 0.99, 1 + 9 * 0.99**2], rtol=1e-6)
  norms = [sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(s)) for _, s in seen]
  assert norms[6] < 0.9 * norms[5]  # the inverses, above all


LAYERS = {
  'a parameter': ("the parameter 'layer_1/kernel' is not finite", lambda p: p['layer_1']['kernel'], np.nan),
  # finite, and too large for a product of two layers
  'an output': ("the output of 'layer_1' is the first that is not finite", lambda p: p['layer_1']['kernel'], 3e38),
}


@pytest.mark.parametrize('name', LAYERS)
def test_the_first_layer_that_is_not_finite_is_named(tmp_path, name):
  words, where, value = LAYERS[name]
  config = config_of(not_finite='stop')
  run = build(config)

  def init(seed):
    state = run.init(seed)
    layer = {**state.params['layer_1'], 'kernel': where(state.params).at[:].set(value)}
    return state._replace(params={**state.params, 'layer_1': layer})

  with pytest.raises(RunError, match=f'step 1: the loss is .+; {words}; lower the learning rate'):
    train(config, tmp_path, quiet=True, run=run._replace(init=init))


def test_layers_inside_of_loops_and_derivatives_are_seen():
  """A network that is differentiated and mapped inside of its loss."""
  from experiments.configs import poisson

  config = poisson.get_config()
  config.model.hidden, config.data.batch_size, config.optimizer, config.mesh = (8,), 64, 'sgd', 'data=1'
  run = built(config)
  order, finite = _outputs(run, run.init(0), next(run.train_batches(0, 0)))
  assert len(order) == 2 and all(finite.values()) and set(finite) == set(order)


MISTAKES = {
  'policy': ({'faults.not_finite': 'ignore'}, "not_finite='ignore' is unknown; choose from stop, skip, damp, rollback"),
  'spike': ({'faults.spike': 'no'}, "spike='no' is unknown"),
  'damp': ({'faults.spike': 'damp'}, "'damp' raises K-FAC's damping; config.optimizer='sgd'"),
  'rollback': ({'faults.spike': 'rollback', 'keep_checkpoints': 0}, 'needs checkpoints'),
  'limit': ({'faults.limit': 0}, 'config.faults.limit=0 must be at least 1'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_policies_that_cannot_be(name):
  changes, words = MISTAKES[name]
  config = config_of()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=words):
    build(config)
