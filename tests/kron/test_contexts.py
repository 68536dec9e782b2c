"""Contexts in which operations were traced are kept: threefry, compute_on, XLA metadata, precision, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import compute_on as compute
from jax.experimental.xla_metadata import set_xla_metadata

from kronmesh import kron
from tests.draws import normal, normals

SHAPES = {'w': (4, 5), 'o': (5, 3)}
KEY = jax.random.key(3)


def dropped(h, key):
  """Dropout as an older run drew it."""
  with jax.threefry_partitionable(False):
    return h * jax.random.bernoulli(key, 0.5, h.shape)


def finish(z):
  return 0.5 * (kron.observe.gaussian(z) ** 2).sum(-1).mean()


def straight(p, x, key):
  return finish(dropped(jnp.tanh(x @ p['w']), key) @ p['o'])


def in_jit(p, x, key):
  return finish(jax.jit(dropped)(jnp.tanh(x @ p['w']), key) @ p['o'])


def in_remat(p, x, key):
  return finish(jax.checkpoint(lambda w, x: dropped(jnp.tanh(x @ w), key))(p['w'], x) @ p['o'])


def in_scan(p, x, key):
  def step(h, key):
    return dropped(jnp.tanh(h @ p['w'] @ p['w'].T), key), None

  h, _ = jax.lax.scan(step, x, jax.random.split(key, 3))
  return finish(h @ p['w'] @ p['o'])


def in_branch(p, x, key):
  h = jax.lax.cond(x[0, 0] > -100, lambda: dropped(x @ p['w'], key), lambda: x @ p['w'])
  return finish(h @ p['o'])


def under_the_other_threefry(p, x, key):
  """A whole region traced in the context, so that it is the region's own."""
  with jax.threefry_partitionable(False):
    region = jax.checkpoint(lambda w, x: jnp.tanh(x @ w) * jax.random.bernoulli(key, 0.5, (16, 5)))
    h = region(p['w'], x)
  return finish(h @ p['o'])


@pytest.mark.brief(
  'under_the_other_threefry-empirical',
  'in_jit-exact',
  'in_branch-empirical',
  'straight-empirical',
  'in_remat-empirical',
  'in_scan-empirical',
)
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('loss', [straight, in_jit, in_remat, in_scan, in_branch, under_the_other_threefry])
def test_value_and_gradient_are_those_of_the_plain_program(loss, fisher):
  params, x = normals(SHAPES), normal(16, 4)
  curvature = kron.curvature(loss, params, x, KEY, fisher=fisher)
  value, grads, _ = jax.jit(curvature.value_and_grad)(params, x, KEY)
  plain, slopes = jax.jit(jax.value_and_grad(loss))(params, x, KEY)
  with jax.threefry_partitionable(True):
    other = jax.jit(lambda p: finish(jnp.tanh(x @ p['w']) * jax.random.bernoulli(KEY, 0.5, (16, 5)) @ p['o']))(params)
  assert value == plain != other
  jax.tree.map(np.testing.assert_array_equal, grads, slopes)


def test_metadata_stay_on_forward_and_backward_operations():
  def loss(p, x):
    with set_xla_metadata(note='abc'):
      h = jnp.tanh(x @ p['w'])
    return finish(h @ p['o'])

  params, x = normals(SHAPES), normal(16, 4)
  curvature = kron.curvature(loss, params, x, fisher='exact')
  plain, ours = (
    jax.jit(f).lower(params, x).as_text().count('note = "abc"')
    for f in (jax.value_and_grad(loss), curvature.value_and_grad)
  )
  assert ours >= plain > 1


@pytest.mark.skipif(not hasattr(compute, 'compute_on2'), reason='compute_on is a function on jax >= 0.12')
def test_the_place_of_computation_stays():
  def loss(p, x):
    h = jnp.tanh(x @ p['w'])
    with compute.compute_on('device_host'):
      z = h @ p['o']
    return finish(z)

  params, x = normals(SHAPES), normal(16, 4)
  curvature = kron.curvature(loss, params, x, fisher='exact')
  plain, ours = (
    jax.jit(f).lower(params, x).as_text().count('_xla_compute_type')
    for f in (jax.value_and_grad(loss), curvature.value_and_grad)
  )
  assert ours >= plain > 1


def test_a_mesh_set_around_some_operations_is_theirs():
  """auto_axes runs its function under another mesh; the operations around it keep theirs."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,))
  params, x = normals(SHAPES), normal(16, 4)
  spec = jax.sharding.PartitionSpec('data')

  def loss(p, x):
    h = jax.sharding.auto_axes(jnp.tanh, out_sharding=spec)(x @ p['w'])
    return finish(h @ p['o'])

  with jax.set_mesh(mesh):
    x = jax.device_put(x, jax.NamedSharding(mesh, spec))
    curvature = kron.curvature(loss, params, x, fisher='exact')
    value, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
    plain, slopes = jax.jit(jax.value_and_grad(loss))(params, x)
  assert value == plain
  jax.tree.map(np.testing.assert_array_equal, grads, slopes)
  rows = np.asarray(x)
  np.testing.assert_allclose(stats.means('w')['A'][0], rows.T @ rows / 16, rtol=1e-5)
