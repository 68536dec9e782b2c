"""Statistics taken inside of a shard_map, and of losses that are one: those of the whole batch, by equality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kronmesh import kron
from kronmesh.program import vary
from tests.draws import normal, normals
from tests.kron.reference import close

PARAMS = normals({'w': (4, 3), 's': (3,), 'o': (3, 2)})
X, Y, MASK = normal(32, 4), normal(32, 2, seed=3), jnp.arange(32) % 5 > 1
MESHES = {'one axis': ((8,), ('d',)), 'two axes': ((4, 2), ('d', 'e'))}


def make_mesh(name):
  shape, axes = MESHES[name]
  return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def network(p, x):
  return jnp.tanh(x @ p['w'] * p['s']) @ p['o']


def mean(p, x, y, mask, total=lambda x: x):
  """The loss of the whole batch, or a shard's part of it where `total` sums over the mesh."""
  z = kron.observe.gaussian(network(p, x), y)
  each = 0.5 * ((z - y) ** 2).sum(-1)
  return total(each.sum()) / total(jnp.asarray(len(x), jnp.float32))


def masked(p, x, y, mask, total=lambda x: x):
  z = kron.observe.gaussian(network(p, x), y, mask=mask)
  each = 0.5 * ((z - y) ** 2).sum(-1)
  return total((each * mask).sum()) / total(mask.sum().astype(jnp.float32))


def two_terms(p, x, y, mask, total=lambda x: x):
  """Every fourth row of a shard is observed once more."""
  z = kron.observe.gaussian(network(p, x), y)
  again = kron.observe.gaussian(jnp.tanh(x[::4] @ p['w']), weight=2.0)
  first = total(0.5 * ((z - y) ** 2).sum()) / total(jnp.asarray(len(x), jnp.float32))
  return first + 2 * total(0.5 * (again**2).sum()) / total(jnp.asarray(len(again), jnp.float32))


def compare(mine, right):
  assert float(mine.examples) == float(right.examples)
  jax.tree.map(np.testing.assert_array_equal, mine.uses, right.uses)
  for name in PARAMS:
    if name in right.sums:
      jax.tree.map(lambda a, b: close(a, b, 1e-5), mine.means(name), right.means(name))


def whole(loss, fisher, **settings):
  return jax.jit(kron.curvature(loss, PARAMS, X, Y, MASK, fisher=fisher, **settings).value_and_grad)(PARAMS, X, Y, MASK)


@pytest.mark.brief('two_terms-empirical-two axes', 'masked-exact-two axes')
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('loss', [mean, masked, two_terms])
def test_a_step_inside_of_a_shard_map(loss, fisher, mesh):
  """By default gradients and statistics are those of all shards."""
  mesh = make_mesh(mesh)
  batch = P(mesh.axis_names)
  local = functools.partial(loss, total=lambda x: jax.lax.psum(x, mesh.axis_names))

  def step(p, x, y, mask):
    return kron.curvature(local, p, x, y, mask, fisher=fisher).value_and_grad(p, x, y, mask)

  run = jax.shard_map(step, mesh=mesh, in_specs=(P(), batch, batch, batch), out_specs=P())
  (value, grads, mine), (plain, slopes, right) = jax.jit(run)(PARAMS, X, Y, MASK), whole(loss, fisher)
  close(value, plain, 1e-6)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, slopes)
  compare(mine, right)


@pytest.mark.brief('pmean-empirical', 'psum of shares-exact', 'none-empirical')
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('reduce', ['pmean', 'psum of shares', 'none'])
def test_however_the_loss_is_reduced(reduce, fisher):
  mesh = make_mesh('one axis')

  def local(p, x, y, mask):
    value = mean(p, x, y, mask)
    return {'pmean': lambda v: jax.lax.pmean(v, 'd'), 'psum of shares': lambda v: jax.lax.psum(v / 8, 'd')}.get(
      reduce, lambda v: v
    )(value)

  def step(p, x, y, mask):
    return kron.curvature(local, p, x, y, mask, fisher=fisher).value_and_grad(p, x, y, mask)[2]

  run = jax.shard_map(step, mesh=mesh, in_specs=(P(), P('d'), P('d'), P('d')), out_specs=P())
  compare(jax.jit(run)(PARAMS, X, Y, MASK), whole(mean, fisher)[2])


@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_local_statistics_of_parameters_that_vary(fisher):
  """Where gradients are each device's own, so are statistics and counts: their sums are those of the batch."""
  mesh = make_mesh('one axis')

  def step(p, x, y, mask):
    p = jax.tree.map(lambda v: jax.lax.pcast(v, ('d',), to='varying'), p)
    stats = kron.curvature(mean, p, x, y, mask, fisher=fisher).value_and_grad(p, x, y, mask)[2]
    return jax.lax.psum(jax.tree.map(lambda v: vary(v, frozenset({'d'})), stats), 'd')

  run = jax.shard_map(step, mesh=mesh, in_specs=(P(), P('d'), P('d'), P('d')), out_specs=P())
  compare(jax.jit(run)(PARAMS, X, Y, MASK), whole(mean, fisher)[2])


@pytest.mark.long('mean-exact')
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('loss', [mean, masked])
def test_an_unchecked_step_has_local_sums(loss, fisher):
  """With check_vma=False gradients are each device's own, and so is all else: the caller sums over the mesh."""
  mesh = make_mesh('one axis')

  def step(p, x, y, mask):
    return jax.lax.psum(kron.curvature(loss, p, x, y, mask, fisher=fisher).value_and_grad(p, x, y, mask)[2], 'd')

  run = jax.shard_map(step, mesh=mesh, in_specs=(P(), P('d'), P('d'), P('d')), out_specs=P(), check_vma=False)
  mine, right = jax.jit(run)(PARAMS, X, Y, MASK), whole(loss, fisher)[2]
  if loss is masked and fisher == 'empirical':  # a mean of each device's own mean weighs observations otherwise
    assert float(mine.examples) == float(right.examples)
  else:
    compare(mine, right)


def masked_terms(p, x, y, mask, total=lambda x: x):
  """Two terms of one size, of which one is masked: on some devices by much more than on others."""
  z = kron.observe.gaussian(network(p, x), y, mask=mask)
  first = total((0.5 * ((z - y) ** 2).sum(-1) * mask).sum()) / total(mask.sum().astype(jnp.float32))
  again = kron.observe.gaussian(jnp.tanh(x @ p['w']), weight=2.0)
  return first + total((again**2).sum()) / total(jnp.asarray(len(again), jnp.float32))


@pytest.mark.brief('mean-empirical-one axis', 'two_terms-empirical-one axis', 'masked_terms-empirical-one axis')
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('loss', [mean, masked, two_terms, masked_terms])
def test_an_unchecked_step_whose_loss_is_that_of_the_mesh(loss, fisher, mesh):
  """Each device counts its share of all observations, though it has fewer or none that a mask lets count."""
  mesh = make_mesh(mesh)
  axes = mesh.axis_names
  mask = jnp.arange(32) % 16 > 12  # none of the first devices, and less than one on the mean
  local = functools.partial(loss, total=lambda x: jax.lax.psum(x, axes))

  def step(p, x, y, mask):
    return jax.lax.psum(kron.curvature(local, p, x, y, mask, fisher=fisher).value_and_grad(p, x, y, mask)[2], axes)

  run = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(axes), P(axes), P(axes)), out_specs=P(), check_vma=False)
  right = jax.jit(kron.curvature(loss, PARAMS, X, Y, mask, fisher=fisher).value_and_grad)(PARAMS, X, Y, mask)[2]
  mine = jax.jit(run)(PARAMS, X, Y, mask)
  close(mine.examples, right.examples, 1e-6)
  compare(mine._replace(examples=right.examples), right._replace(examples=right.examples))


@pytest.mark.brief('empirical-False')
@pytest.mark.parametrize('check', [True, False])
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_a_token_before_those_of_every_example(fisher, check):
  """Each example has its own copy of the parameter, on whichever device."""

  def loss(p, x, y, mask, total=lambda x: x):
    tokens = jnp.concatenate([jnp.broadcast_to(p['s'], (len(x), 1, 3)), (x @ p['w'])[:, None]], 1)
    z = kron.observe.gaussian(jnp.tanh(tokens).prod(1) @ p['o'], y)
    return total(0.5 * ((z - y) ** 2).sum()) / total(jnp.asarray(len(x), jnp.float32))

  local = functools.partial(loss, total=lambda x: jax.lax.psum(x, 'd'))
  specs = (P(), P('d'), P('d'), P('d'))
  over = jax.shard_map(local, mesh=make_mesh('one axis'), in_specs=specs, out_specs=P(), check_vma=check)
  compare(whole(over, fisher)[2], whole(loss, fisher)[2])


@pytest.mark.brief('False')
@pytest.mark.parametrize('check', [True, False])
def test_an_order_that_a_loss_closes_over_is_a_layout(check):
  """Also as a constant of a shard_map's body."""
  order, keep = jnp.array([1, 0, 2]), jnp.array([[1.0, 0], [1, 1], [0, 1]])

  def loss(p, x, y, mask, total=lambda x: x):
    z = kron.observe.gaussian(jnp.tanh(x @ p['w'] * p['s']) @ (p['o'][order] * keep), y)
    return total(0.5 * ((z - y) ** 2).sum()) / total(jnp.asarray(len(x), jnp.float32))

  mesh = make_mesh('one axis')
  local = functools.partial(loss, total=lambda x: jax.lax.psum(x, 'd'))
  over = jax.shard_map(local, mesh=mesh, in_specs=(P(), P('d'), P('d'), P('d')), out_specs=P(), check_vma=check)
  compare(whole(over, 'exact')[2], whole(loss, 'exact')[2])


@pytest.mark.parametrize('check', [True, False])
def test_a_table_that_is_read_alike_on_all_devices_is_refused(check):
  """By an argument, so that the rows are not known: they are of no example."""

  def local(p, x, y, order):
    z = kron.observe.gaussian(jnp.tanh(x @ p['w'] * p['s']) @ p['o'][order], y)
    return jax.lax.pmean(0.5 * ((z - y) ** 2).sum(-1).mean(), 'd')

  over = jax.shard_map(
    local, mesh=make_mesh('one axis'), in_specs=(P(), P('d'), P('d'), P()), out_specs=P(), check_vma=check
  )
  with pytest.raises(kron.CurvatureError, match=r"'o' is used by gather \(of the same rows on all devices"):
    kron.curvature(over, PARAMS, X[:8], Y[:8], jnp.array([1, 0, 2]), fisher='exact')


@pytest.mark.brief('empirical-batch1-True', 'empirical-batch0-False', 'exact-batch0-False')
@pytest.mark.parametrize('check', [True, False])
@pytest.mark.parametrize('batch', [('d',), ('d', 'e')])
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_a_loss_that_is_a_shard_map(fisher, batch, check):
  """The batch over one axis of two, the other one idle, or over both."""
  mesh = make_mesh('two axes')
  local = functools.partial(mean, total=lambda x: jax.lax.psum(x, batch))
  spec = P(batch)
  loss = jax.shard_map(local, mesh=mesh, in_specs=(P(), spec, spec, spec), out_specs=P(), check_vma=check)
  compare(whole(loss, fisher)[2], whole(mean, fisher)[2])


@pytest.mark.long('exact-True')
@pytest.mark.parametrize('check', [True, False])
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_places_of_every_example_on_several_devices(fisher, check):
  """Sequences divided along an axis: a part of the network before the sum over it, a part after."""
  mesh = make_mesh('two axes')
  x = normal(8, 6, 4)

  def loss(p, x, y, total=lambda x: x, join=lambda x: x):
    h = join((x * p['c'] @ p['w']).sum(1))
    z = kron.observe.gaussian(jnp.tanh(h * p['s']) @ p['o'], y)
    return total(0.5 * ((z - y) ** 2).sum()) / total(jnp.asarray(len(x), jnp.float32))

  params, y = {**PARAMS, 'c': normal(4, seed=8)}, Y[:8]
  join = {'total': lambda x: jax.lax.psum(x, 'd'), 'join': lambda x: jax.lax.psum(x, 'e')}
  specs = (P(), P('d', 'e'), P('d'))
  divided = jax.shard_map(functools.partial(loss, **join), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
  stats = [
    jax.jit(kron.curvature(f, params, x, y, fisher=fisher).value_and_grad)(params, x, y)[2] for f in (divided, loss)
  ]
  assert float(stats[0].examples) == 8
  for name in stats[1].sums:
    jax.tree.map(lambda a, b: close(a, b, 1e-5), stats[0].means(name), stats[1].means(name))
  jax.tree.map(lambda a, b: close(a, b, 1e-6), stats[0].uses, stats[1].uses)


def test_sampled_targets_are_drawn_apart():
  """Devices with the same key draw other targets for their own observations."""
  mesh = make_mesh('one axis')
  x, key = jnp.ones((8, 4)), jax.random.key(0)

  def step(p, x, key):
    loss = lambda p, x: jax.lax.pmean(0.5 * (kron.observe.gaussian(x @ p['w']) ** 2).sum(-1).mean(), 'd')  # noqa: E731
    stats = kron.curvature(loss, p, x).value_and_grad(p, x, key=key)[2]
    return stats.means('w')['G'][0]

  run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P('d'), P()), out_specs=P()))
  g = run({'w': PARAMS['w']}, x, key)
  assert np.linalg.matrix_rank(np.asarray(g)) == 3  # one drawn vector for all devices would leave a rank of one
  draws = jnp.stack([run({'w': PARAMS['w']}, x, jax.random.key(k)) for k in range(200)]).mean(0)
  close(draws, np.eye(3), 0.1)
