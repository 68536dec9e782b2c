"""The pages for people who come from another library: their code runs, and leaves what they say."""

import functools
import inspect
import pickle
import re
from pathlib import Path

import flax.serialization
import haiku as hk
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import kronmesh
from kronmesh import kron, parallel

FOLDER = Path(__file__).parents[2] / 'docs/neighbours'
PAGES = {path.stem: path.read_text() for path in sorted(FOLDER.glob('*.md'))}
SETTINGS = {
  name
  for fn in (
    kron.curvature,
    kron.Curvature.value_and_grad,
    kron.kfac,
    kron.ekfac,
    kron.adaptive_kfac,
    kron.quadratic_step,
    kron.adapt_damping,
    kron.observe.gaussian,
  )
  for name in inspect.signature(fn).parameters
} | {'stats', 'phase'}

# The constructor arguments of kfac-jax 0.0.8, which are those of its commit babd853.
ARGUMENTS = re.findall(
  r'\w+',
  """
value_and_grad_func l2_reg regularized_parameters_path_exclusions value_func_has_aux value_func_has_state
value_func_has_rng value_func_for_estimator use_adaptive_learning_rate learning_rate_schedule use_adaptive_momentum
momentum_schedule use_adaptive_damping damping_schedule initial_damping use_initial_damping_calibration min_damping
max_damping include_damping_in_quad_change damping_adaptation_interval damping_adaptation_decay damping_lower_threshold
damping_upper_threshold always_use_exact_qmodel_for_damping_adjustment precon_damping_mult precon_damping_schedule
use_step_rejection reject_damping_increase_factor norm_constraint num_burnin_steps estimation_mode custom_estimator_ctor
curvature_ema curvature_update_period inverse_update_period use_exact_inverses batch_process_func register_only_generic
patterns_to_skip use_automatic_registration auto_register_kwargs layer_tag_to_block_ctor multi_device debug
invalid_metric_value batch_size_extractor pmap_axis_name forbid_setting_attributes_after_finalize
modifiable_attribute_exceptions include_norms_in_stats include_per_param_norms_in_stats include_registered_loss_in_stats
distributed_precon_apply distributed_inverses num_estimator_samples should_vmap_estimator_samples
norm_to_scale_identity_weight_per_block precon_power exact_quad_model_matrix_type
""",
)


def blocks(page, kind='python'):
  return re.findall(rf'```{kind}\n(.*?)```', PAGES[page], re.DOTALL)


def run(page):
  """Executes a page's blocks in order and returns the names that they leave."""
  names = {}
  for block in blocks(page):
    exec(block, names)
  return names


def same(a, b):
  """Checks two trees for equality, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.parametrize('page', PAGES)
def test_a_page_is_short_and_what_it_names_is_there(page):
  text = PAGES[page]
  assert 40 <= len(text.splitlines()) <= 130
  for block in blocks(page) + blocks(page, 'py'):
    compile(block, page, 'exec')
    assert max(map(len, block.splitlines())) <= 130
  for name in re.findall(r'\b((?:kron|parallel)(?:\.\w+)+)', text):
    assert functools.reduce(getattr, name.split('.'), kronmesh), name
  for link in re.findall(r'\]\(([\w./]+)\)', text):
    assert (FOLDER / link).exists(), link
  prose = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  for name in re.findall(r'`([a-z]\w*)=', prose):
    assert name in SETTINGS | set(inspect.signature(parallel.Placement).parameters), name


def test_the_table_has_every_argument_of_kfac_jax_once():
  cells = re.findall(r'^\| (`.*?) \| (.*) \|$', PAGES['kfac_jax'], re.MULTILINE)
  named = [name for cell, _ in cells for name in re.findall(r'`(\w+)`', cell)]
  assert sorted(named) == sorted(ARGUMENTS)


@pytest.mark.long
def test_the_autoencoder_of_kfac_jax():
  """The loss falls as the page says, by a factor of 2.4."""
  names = run('kfac_jax')
  losses = names['losses']
  assert losses[0] == pytest.approx(44.28, abs=0.005) and losses[-1] == pytest.approx(18.2, abs=0.3)
  assert float(names['state'].damping) < 0.05  # 1 at the start


@pytest.mark.long
def test_the_ground_state_of_hydrogen():
  """The energy is that of the page; gradient and curvature are those that FermiNet registers with kfac-jax."""
  names = run('ferminet')
  energy, params, walkers = names['energy'], names['params'], names['walkers']
  assert energy[0] == pytest.approx(-0.466, abs=5e-4) and np.mean(energy[-10:]) == pytest.approx(-0.5, abs=0.005)
  _, grads, stats = jax.jit(names['curvature'].value_and_grad)(params, walkers)
  close(grads, jax.jit(jax.grad(names['total_energy'], has_aux=True))(params, walkers)[0])
  # The derivative of log|psi| in the decay is -r, and the Fisher information of a normal of variance 1/2 is 2.
  squares = 2 * (np.asarray(walkers) ** 2).sum(-1).mean()
  assert float(stats.means('decay')['F'].squeeze()) == pytest.approx(squares, rel=1e-4)

  def in_the_rule(params, x):
    return moved(params, x)

  @jax.custom_jvp
  def moved(params, x):
    return names['network'](params, x).mean()

  @moved.defjvp
  def rule(primals, tangents):
    def marked(params):
      return kron.observe.gaussian(names['network'](params, primals[1])[:, None]).mean()

    return jax.jvp(marked, primals[:1], tangents[:1])

  with pytest.raises(kron.CurvatureError, match='needs the likelihood'):
    kron.curvature(in_the_rule, params, walkers, fisher='exact')


@pytest.mark.long
def test_optax():
  """Both losses are those of the page; chains, masks and accumulation give the updates that they should."""
  names = run('optax')
  curvature, batch, start, choices = (names[name] for name in ('curvature', 'batch', 'start', 'choices'))
  assert names['muon_loss'] < 0.004 and names['kfac_loss'] < 1e-4
  _, grads, stats = names['gradient'](start, batch)

  def first(tx, **extra):
    return jax.jit(tx.update)(grads, tx.init(start), start, **extra)[0]

  plain = kron.kfac(0.1, curvature, damping=0.03)
  close(names['updates'], first(names['tx'], stats=stats))  # four microbatches and the whole batch
  close(first(choices['injected'], stats=stats), first(plain, stats=stats))
  mixed, adamw = first(choices['partitioned'], stats=stats), first(optax.adamw(0.01))
  alone = first(
    optax.masked(kron.kfac(0.1, curvature), {'w1': True, 'b1': True, 'w2': False, 'b2': False}), stats=stats
  )
  close(mixed, {'w1': alone['w1'], 'b1': alone['b1'], 'w2': adamw['w2'], 'b2': adamw['b2']})
  for name in ('clipped', 'links'):
    after = optax.apply_updates(start, first(choices[name], stats=stats))
    assert names['loss_fn'](after, batch) < names['loss_fn'](start, batch)
  apart = optax.partition({'k': plain, 's': optax.sgd(0.1)}, {'w1': 'k', 'b1': 's', 'w2': 'k', 'b2': 'k'})
  with pytest.raises(kron.CurvatureError, match="'b1' shares a block with 'w1'"):
    first(apart, stats=stats)
  with pytest.raises(kron.CurvatureError, match='MultiSteps'):
    first(optax.MultiSteps(plain, 2), stats=stats)
  ahead = optax.lookahead(plain, 3, 0.5)
  synced = optax.LookaheadParams.init_synced(start)
  with pytest.raises(kron.CurvatureError, match='update was given no stats='):
    ahead.update(grads, ahead.init(synced), synced)


@pytest.mark.long
def test_flax():
  """The losses of linen and of both nnx loops fall to a tenth; what is no parameter moves, too."""
  names = run('flax')
  state, start, batch, key = (names[name] for name in ('state', 'start', 'batch', 'key'))
  before, _ = names['loss_fn'](start['params'], start['batch_stats'], batch, key)
  assert state.step == 20 and names['loss'] < 0.1 * before
  assert not np.allclose(state.batch_stats['BatchNorm_0']['mean'], start['batch_stats']['BatchNorm_0']['mean'])
  for losses in (names['module_losses'], names['split_losses']):
    assert losses[-1] < 0.1 * losses[0]
  assert not np.allclose(names['norm'].mean[...], 0) and names['optimizer'].step[...] == 20
  plain = TrainState.create(apply_fn=None, params=start['params'], tx=state.tx)
  with pytest.raises(kron.CurvatureError, match='update was given no stats='):
    plain.apply_gradients(grads=start['params'])
  drawn = []
  for number in (0, 1):
    _, params, rest = names['nnx'].split(names['model'], names['nnx'].Param, ...)
    _, _, stats = jax.jit(names['of_params'].value_and_grad)(params, rest, batch, key=jax.random.key(number))
    drawn.append(stats.means('layers/4/kernel/value')['G'])
  assert not np.allclose(*drawn)  # another key, other targets


@pytest.mark.long
def test_equinox():
  """The loss falls as the page says, its table is the curvature's, and the state that was written goes on bit for bit."""
  names = run('equinox')
  assert names['losses'][-1] < 0.03 < 2 < names['losses'][0]
  assert str(names['curvature']) in PAGES['equinox']
  args = names['params'], names['state']
  more = names['x'], names['y'], names['key']
  same(names['step'](*args, names['restored'], *more), names['step'](*args, names['opt_state'], *more))
  assert [block.name for block in names['head_curvature'].blocks] == ['last/weight']
  assert len(jax.tree.leaves(names['grads'])) == 2
  with pytest.raises((TypeError, kron.CurvatureError)):
    kron.curvature(lambda model, x: names['head_loss'](model, x, names['y']), names['model'], names['x'])


@pytest.mark.long
def test_haiku():
  """The loss falls as the page says, its table is the curvature's, and labels divide the parameters."""
  names = run('haiku')
  net, x, key, mixed, curvature = (names[name] for name in ('net', 'x', 'key', 'mixed', 'curvature'))
  assert names['losses'][-1] < 0.04 < 2 < names['losses'][0]
  assert str(curvature) in PAGES['haiku']
  assert names['mixed_losses'][-1] < 0.4 * names['mixed_losses'][0]
  params, state = net.init(key, x, True)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, state, x, names['y'], key)
  found = jax.jit(mixed.update)(grads, mixed.init(params), params, stats=stats)[0]
  adam = optax.adam(1e-3)
  right = adam.update(grads, adam.init(params), params)[0]
  close({k: found[k] for k in ('batch_norm', 'linear_1')}, {k: right[k] for k in ('batch_norm', 'linear_1')})
  assert not np.allclose(found['linear']['w'], right['linear']['w'])
  labels = hk.data_structures.map(lambda module, name, value: 'k' if name == 'w' else 's', params)
  apart = optax.partition({'k': kron.kfac(0.1, curvature), 's': optax.sgd(0.1)}, labels)
  with pytest.raises(kron.CurvatureError, match=r"shares a block with 'linear\w*/w'"):
    apart.update(grads, apart.init(params), params, stats=stats)
  args = names['loss_fn'], params, state, x, names['y'], key
  by_name = {'approximation': {'linear/w': 'diagonal'}, 'sharing': {'*/w': 'reduce'}}
  assert 'diagonal' in str(kron.curvature(*args, has_aux=True, **by_name))


@pytest.mark.long
def test_saving(tmp_path):
  """Every way restores the next step bit for bit; on four devices the logical form does, and others are refused."""
  names = run('saving')
  step, batch, opt_state, params = (names[name] for name in ('step', 'batch', 'opt_state', 'params'))
  following = step(params, opt_state, batch)
  for way in ('by_orbax', 'by_flax', 'by_pickle'):
    restored = names[way]
    same(step(restored['params'], restored['opt_state'], batch), following)

  folders = (tmp_path / str(number) for number in range(9))

  def by_orbax(saved, like):
    path = next(folders)
    with ocp.StandardCheckpointer() as writer:
      writer.save(path, saved)
      writer.wait_until_finished()
      return writer.restore(path, like)

  whole = [
    pickle.loads(pickle.dumps(jax.device_get(opt_state))),
    flax.serialization.from_bytes(names['shapes'], flax.serialization.to_bytes(opt_state)),
    by_orbax(opt_state, names['shapes']),
  ]
  for restored in whole:
    same(step(params, restored, batch), following)

  # Four devices.
  assert len(names['loss4'].sharding.device_set) == 4
  close((names['params4'], names['loss4']), (following[0], following[2]))
  shapes, everywhere = names['shapes4'], names['whole4']
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(kron.to_logical, shapes)
  )
  moved = kron.from_logical(by_orbax(kron.to_logical(opt_state), like), shapes)
  ready = jax.device_put(params, everywhere)
  same(names['step4'](ready, moved, batch)[0], names['params4'])
  for restore in (
    lambda: whole[0],
    lambda: flax.serialization.from_bytes(shapes, flax.serialization.to_bytes(opt_state)),
    lambda: by_orbax(opt_state, shapes),
  ):
    with pytest.raises((ValueError, TypeError, KeyError)):
      names['step4'](ready, restore(), batch)
