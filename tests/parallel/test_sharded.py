"""K-FAC on a mesh equals K-FAC on one device, and meshes are checked before anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kronmesh import kron, parallel
from kronmesh.parallel import MeshError, make_mesh, parse_mesh


def loss_fn(params, x, y):
  h = jnp.tanh(x @ params['up'] + params['shift'])
  z = kron.observe.gaussian(h @ params['down'])
  return 0.5 * ((z - y) ** 2).sum(-1).mean()


def run(spec, n_devices, dtype, rule='kfac'):
  mesh = make_mesh(spec, jax.devices()[:n_devices])
  k = jax.random.split(jax.random.key(0), 4)
  params = {
    'up': jax.random.normal(k[0], (6, 8), dtype) / 2,
    'shift': jnp.zeros(8, dtype),
    'down': jax.random.normal(k[1], (8, 4), dtype) / 2,
  }
  axes = {'up': PartitionSpec('in', 'hidden'), 'shift': PartitionSpec('hidden'), 'down': PartitionSpec('hidden', 'in')}
  shardings = parallel.param_shardings(params, axes, parallel.RULES['mlp'], mesh)
  data = parallel.batch_sharding(mesh, 32)
  x, y = (jax.device_put(jax.random.normal(key, (32, n), dtype), data) for key, n in ((k[2], 6), (k[3], 4)))
  params = jax.device_put(params, shardings)
  placement = parallel.Placement(mesh)
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact', placement=placement)
  make = {'kfac': kron.kfac, 'stale': functools.partial(kron.stale_kfac, threshold=0.5)}[rule]
  tx = make(0.3, curvature, damping=0.01, placement=placement)
  state_shardings = parallel.state_shardings(jax.eval_shape(tx.init, params), shardings, mesh, placement=placement)
  state = jax.jit(tx.init, out_shardings=state_shardings)(params)

  traces = []

  def step(params, state):
    traces.append(1)
    due = kron.due(state, curvature) if rule == 'stale' else True
    loss, grads, stats = curvature.value_and_grad(params, x, y, statistics=due)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  step = jax.jit(step, out_shardings=(shardings, state_shardings, NamedSharding(mesh, PartitionSpec())))
  values = []
  for _ in range(5):
    params, state, loss = step(params, state)
    values.append(float(loss))
  factors = kron.factors(jax.device_get(state))
  assert len(traces) == 1, 'the state changes its sharding or type'
  if rule == 'stale':
    assert 0 < float(optax.tree_utils.tree_get(state, 'refreshes_saved')) < 0.5
    factors = factors, jax.device_get(kron.intervals(state, curvature))
  return values, jax.device_get(params), factors


@pytest.mark.parametrize('spec', ['data=2,fsdp=2,model=2'])
def test_eight_devices_equal_one(spec):
  for a, b in zip(*(jax.tree.leaves(run(s, n, jnp.float32)) for s, n in ((spec, 8), ('data=1', 1))), strict=True):
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.long('stale')
@pytest.mark.parametrize('rule', ['stale'])
def test_eight_devices_equal_one_in_f64(x64, rule):
  pairs = (jax.tree.leaves(run(s, n, jnp.float64, rule)) for s, n in (('data=4,model=2', 8), ('data=1', 1)))
  for a, b in zip(*pairs, strict=True):
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-10 * np.linalg.norm(b)


def test_mesh_strings():
  assert parse_mesh('data=-1,model=2', 8) == {'data': 4, 'model': 2}
  assert parse_mesh('', 8) == {'data': 8}
  assert make_mesh('data=2,fsdp=2,model=2').axis_names == ('data', 'fsdp', 'model')


@pytest.mark.parametrize(
  'spec, words',
  [
    ('date=8', "axis 'date' is unknown"),
    ('data=3', 'does not match the 8 devices'),
    ('data=-1,model=3', 'does not match the 8 devices'),
    ('data=-1,model=-1', 'only one axis'),
    ('data=2,data=4', 'given twice'),
    ('data=²', 'write each axis as name=size'),
    ('data=+8', 'write each axis as name=size'),
    ('data=٨', 'write each axis as name=size'),
    ('data', 'name=size'),
    ('data=0', 'name=size'),
    ('data=x', 'name=size'),
  ],
)
def test_a_wrong_mesh_is_one_line(spec, words):
  with pytest.raises(MeshError) as error:
    parse_mesh(spec, 8)
  assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.wrong_types
def test_a_placement_that_cannot_be_is_refused_by_the_optimiser():
  """Without a word from the user's side: no group is rounded to another."""
  params, x = {'w': jnp.ones((3, 2))}, jnp.ones((8, 3))
  curvature = kron.curvature(lambda p, x: kron.observe.gaussian(x @ p['w']).mean(), params, x)
  with pytest.raises(MeshError, match="inverses='some' is unknown"):
    kron.kfac(0.1, curvature, placement=parallel.Placement(make_mesh('data=8'), inverses='some'))


def test_a_batch_or_rule_that_does_not_fit():
  mesh = make_mesh('data=4,model=2')
  with pytest.raises(MeshError, match='batch_size=6 does not divide by the 4 shards'):
    parallel.batch_sharding(mesh, 6)
  with pytest.raises(MeshError, match="w: logical axis 'heads' has no rule"):
    parallel.param_shardings({'w': jnp.ones((2, 2))}, {'w': PartitionSpec('heads', None)}, {'in': None}, mesh)


def test_a_kernel_has_as_many_blocks_as_shards():
  mesh = make_mesh('data=2,model=4')
  specs = {'layer': {'columns': (None, 'model'), 'rows': ('model', None), 'bias': ('model',), 'whole': (None, None)}}
  shardings = jax.tree.map(
    lambda s: NamedSharding(mesh, PartitionSpec(*s)), specs, is_leaf=lambda s: isinstance(s, tuple)
  )
  assert parallel.shard_blocks(shardings) == {'layer/columns': {'G': 4}, 'layer/rows': {'A': 4}}
  assert parallel.shard_blocks(shardings, 'data') == {}
