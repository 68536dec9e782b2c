"""Explicit axes, where shardings are part of types, and value_and_grad inside of a shard_map: the same as anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kronmesh import kron, parallel
from tests.draws import normal
from tests.kron.reference import close

P = PartitionSpec
SPECS = {'up': P(None, 'model'), 'shift': P('model'), 'down': P('model', None)}
RULES = {'kfac': kron.kfac, 'ekfac': kron.ekfac, 'kfac_adam': kron.kfac_adam, 'stale_kfac': kron.stale_kfac}


def loss_fn(params, x, y, explicit=False):
  h = jnp.tanh(x @ params['up'] + params['shift'])
  out = {'out_sharding': P('data', None)} if explicit else {}
  z = kron.observe.gaussian(jnp.matmul(h, params['down'], **out))
  return 0.5 * ((z - y) ** 2).sum(-1).mean()


def draw():
  return {'up': normal(6, 8, seed=1), 'shift': normal(8, seed=2), 'down': normal(8, 4, seed=3)}


def three_steps(mesh, rule, explicit=False, placed=False, fisher='exact'):
  """Parameters after three steps, and the sharding types of the state before and after."""
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
  params = jax.tree.map(put, draw(), SPECS)
  x, y = put(normal(16, 6, seed=4), P('data')), put(normal(16, 4, seed=5), P('data'))
  placement = parallel.Placement(mesh) if placed else None
  loss = functools.partial(loss_fn, explicit=explicit)
  curvature = kron.curvature(loss, params, x, y, fisher=fisher, placement=placement)
  settings = {} if rule == 'kfac_adam' else {'damping': 0.01}
  tx = RULES[rule](0.1, curvature, placement=placement, **settings)
  state = jax.jit(tx.init)(params)
  types = [jax.tree.map(jax.typeof, (params, state))]

  @jax.jit
  def step(params, state, x, y):
    basis = kron.basis(state, curvature) if rule == 'ekfac' else None
    _, grads, stats = curvature.value_and_grad(params, x, y, basis=basis, key=jax.random.key(0))
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  for _ in range(3):
    params, state = step(params, state, x, y)
  types.append(jax.tree.map(jax.typeof, (params, state)))
  return jax.device_get(params), types


@pytest.fixture(scope='module')
def expected():
  mesh = parallel.make_mesh('data=1,model=1', jax.devices()[:1])
  return functools.cache(lambda rule, fisher: three_steps(mesh, rule, fisher=fisher)[0])


CASES = [(r, 'exact', p) for r in RULES for p in (False, True)] + [('kfac', f, True) for f in ('sampled', 'empirical')]


@pytest.mark.brief('kfac-empirical-True')
@pytest.mark.parametrize('rule, fisher, placed', CASES)
def test_explicit_axes(expected, rule, fisher, placed):
  mesh = parallel.make_mesh('data=4,model=2', explicit=True)
  with jax.set_mesh(mesh):
    found, (before, after) = three_steps(mesh, rule, explicit=True, placed=placed, fisher=fisher)
  assert before == after
  jax.tree.map(lambda a, b: close(a, b, 2e-5), found, expected(rule, fisher))


@pytest.mark.long
@pytest.mark.parametrize('check_vma', [False, True])
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_inside_of_a_shard_map(fisher, check_vma):
  """Each device has the gradient and statistics of its own shard; one placement adds them up as it does its own."""
  mesh = parallel.make_mesh('data=8')
  params, x, y = draw(), normal(32, 6, seed=4), normal(32, 4, seed=5)
  small = kron.curvature(loss_fn, params, x[:4], y[:4], fisher=fisher)

  def local(params, x, y):
    params = jax.tree.map(lambda p: jax.lax.pcast(p, 'data', to='varying'), params) if check_vma else params
    loss, grads, stats = small.value_and_grad(params, x, y)
    lead = lambda s: s[None]  # noqa: E731
    sums = jax.tree.map(lead, stats.sums)
    uses, examples = jax.lax.psum((stats.uses, stats.examples), 'data')
    return jax.lax.pmean((loss, grads), 'data'), sums, uses, examples

  out = (P(), P('data'), P(), P())
  sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P('data'), P('data')), out_specs=out, check_vma=check_vma)
  (loss, grads), *parts = jax.jit(sharded)(params, x, y)
  whole = kron.curvature(loss_fn, params, x, y, fisher=fisher)
  expected_loss, expected_grads, expected_stats = whole.value_and_grad(params, x, y)
  close(loss, expected_loss, 1e-6)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, expected_grads)
  updates = []
  for stats, placement in ((kron.Statistics(*parts), parallel.Placement(mesh)), (expected_stats, None)):
    tx = kron.kfac(0.1, small, damping=0.01, placement=placement)
    updates.append(jax.jit(tx.update)(expected_grads, tx.init(params), params, stats=stats)[0])
  if fisher == 'exact':
    jax.tree.map(lambda a, b: close(a, b, 1e-5), *updates)
  else:  # each shard's gradients are of its own mean: the sums count in its own examples
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *updates)
