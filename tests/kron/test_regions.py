"""Loops, branches, meshes and functions with derivative rules of their own: factors as if all were written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.gallery import N, squared
from tests.kron.reference import close
from tests.kron.unrolled import check

KEY = jax.random.key(0)
DENSE = {'w': (4, 4), 'b': (4,), 'out': (4, 3)}


def dense(w, b, x):
  return jnp.tanh(x @ w + b)


@jax.custom_vjp
def clipped(w, x):
  """A product whose gradient is not its own."""
  return x @ w


clipped.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (jnp.clip(r[1].T @ g, -0.01, 0.01), g @ r[0].T))


@jax.custom_jvp
def scaled_slope(w, x):
  return x @ w


@scaled_slope.defjvp
def _scaled_slope_jvp(primals, tangents):
  (w, x), (dw, dx) = primals, tangents
  return x @ w, 0.5 * (x @ dw) + dx @ w


@jax.custom_vjp
def opaque(w, x):
  """A kernel that no tracing sees through: a host callback stands for a hand-written GPU kernel."""
  return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), jax.ShapeDtypeStruct((N, 4), jnp.float32), w, x)


opaque.defvjp(lambda w, x: (opaque(w, x), (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


def scan_over_time(p, x):
  def step(h, x):
    h = jnp.tanh(x @ p['w'] + h @ p['u'] + p['b'])
    return h, h @ p['out']

  return jax.lax.scan(step, jnp.zeros((N, 4)), x.swapaxes(0, 1))[1].sum(0)


def layers(p, x, reverse=False, unroll=1):
  step = lambda h, layer: (dense(layer['w'], layer['b'], h), None)  # noqa: E731
  return jax.lax.scan(step, x, p['layers'], reverse=reverse, unroll=unroll)[0] @ p['out']


def nested(p, x):
  """Two groups of three layers; the weight `u` is shared in each group and its own in each of the two."""

  def group(h, own):
    step = lambda h, layer: (dense(layer, own['b'], h) @ own['u'], None)  # noqa: E731
    return jax.lax.scan(step, h, own['w'])[0], None

  return jax.lax.scan(group, x, p['groups'])[0] @ p['out']


def learned_state(p, x):
  step = lambda h, x: (jnp.tanh(x + h @ p['w'] + p['b']), None)  # noqa: E731
  return jax.lax.scan(step, jnp.broadcast_to(p['start'], (N, 4)), x.swapaxes(0, 1))[0] @ p['out']


def branches(index):
  def network(p, x):
    return (
      jax.lax.switch(index, [lambda x: dense(p['w'], p['b'], x), lambda x: x @ p['w'], lambda x: x**2], x) @ p['out']
    )

  return network


STACKED = {'layers': {'w': (3, 4, 4), 'b': (3, 4)}, 'out': (4, 3)}
PROGRAMS = {
  'a weight over time': (scan_over_time, {'w': (4, 4), 'u': (4, 4), 'b': (4,), 'out': (4, 3)}, (5, 4)),
  'stacked layers': (layers, STACKED, (4,)),
  'stacked layers backwards': (functools.partial(layers, reverse=True), STACKED, (4,)),
  'stacked layers unrolled': (functools.partial(layers, unroll=3), STACKED, (4,)),
  'loops in loops': (nested, {'groups': {'w': (2, 3, 4, 4), 'b': (2, 4), 'u': (2, 4, 4)}, 'out': (4, 3)}, (4,)),
  'scan of remat': (lambda p, x: jax.checkpoint(layers)(p, x), STACKED, (4,)),
  'fori_loop': (
    lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: dense(p['w'], p['b'], h), x) @ p['out'], DENSE, (4,),
  ),
  'cond, taken': (lambda p, x: jax.lax.cond(True, lambda x: dense(p['w'], p['b'], x), jnp.sin, x) @ p['out'], DENSE, (4,)),
  'the first branch': (branches(0), DENSE, (4,)),
  'the second branch': (branches(1), DENSE, (4,)),
  'a layer after itself': (lambda p, x: dense(p['w'], p['b'], dense(p['w'], p['b'], x)) @ p['out'], DENSE, (4,)),
  'transposed and not': (lambda p, x: jnp.tanh(x @ p['w'] + p['b']) @ p['w'].T @ p['out'], DENSE, (4,)),
  'vmap over stacked layers': (
    lambda p, x: jax.vmap(dense, (0, 0, None))(p['layers']['w'], p['layers']['b'], x).mean(0) @ p['out'], STACKED, (4,),
  ),
  'custom_jvp around data': (
    lambda p, x: jax.nn.relu(jax.nn.silu(x @ p['w'] + p['b'])) @ p['out'], DENSE, (4,),
  ),
  'slices of one parameter': (
    lambda p, x: jnp.concatenate([jnp.tanh(x @ p['w'][:, :3]), jnp.sin(x @ p['w'][:, 3:])], -1) @ p['out'],
    {'w': (4, 5), 'out': (5, 3)}, (4,),
  ),
  'two parameters as one': (
    lambda p, x: jnp.tanh(x @ jnp.concatenate([p['v'], p['w']], -1)) @ p['out'],
    {'v': (4, 2), 'w': (4, 3), 'out': (5, 3)}, (4,),
  ),
}  # fmt: skip


def objective(network):
  return lambda p, x: squared(network(p, x))


@pytest.mark.brief('the second branch', 'two parameters as one', 'cond, taken', 'stacked layers')
@pytest.mark.parametrize('name', PROGRAMS)
def test_factors_are_those_of_the_program_written_out(name):
  network, shapes, x_shape = PROGRAMS[name]
  params, x = normals(shapes), normal(N, *x_shape)
  loss = objective(network)
  curvature = kron.curvature(loss, params, x, fisher='empirical')
  assert not curvature.gradient_only
  assert check(curvature, loss, params, (x,), N) == len(curvature.blocks)
  value, grads, _ = jax.jit(curvature.value_and_grad)(params, x)
  expected_value, expected = jax.jit(jax.value_and_grad(loss))(params, x)
  assert value == expected_value
  jax.tree.map(lambda a, b: close(a, b, 1e-6), grads, expected)


def test_a_learned_initial_state():
  """Every example has its own copy of the state it starts from; the reference is a copy written out."""
  params = normals({'w': (4, 4), 'b': (4,), 'start': (4,), 'out': (4, 3)})
  x = normal(N, 5, 4)
  loss = objective(learned_state)
  curvature = kron.curvature(loss, params, x, fisher='empirical')
  stats = jax.jit(curvature.value_and_grad)(params, x)[2]
  copies = jnp.tile(params['start'], (N, 1))
  grads = jax.grad(lambda s: loss({**params, 'start': s}, x) * N)(copies)
  close(stats.sums['start']['F'][:, 0, 0], (grads**2).sum(0), 1e-5)


def test_an_untaken_branch_adds_nothing():
  params, x = normals(DENSE), normal(N, 4)
  network = branches(2)
  stats = jax.jit(kron.curvature(objective(network), params, x, fisher='empirical').value_and_grad)(params, x)[2]
  assert stats.uses['w']['A'] == 0 and not np.any(stats.sums['w']['A']) and np.any(stats.sums['out']['A'])


@pytest.mark.long
def test_stacked_layers_share_one_factor_array():
  params, x = normals(STACKED), normal(N, 4)
  curvature = kron.curvature(objective(layers), params, x, fisher='exact')
  stats = jax.jit(curvature.value_and_grad)(params, x)[2]
  assert stats.sums['layers/w']['A'].shape == (3, 5, 5) and np.all(stats.uses['layers/w']['A'] == N)

  def unstacked(p, x):
    for k in range(3):
      x = dense(p[f'w{k}'], p[f'b{k}'], x)
    return x @ p['out']

  flat = {f'{name}{k}': params['layers'][name][k] for name in 'wb' for k in range(3)} | {'out': params['out']}
  expected = jax.jit(kron.curvature(objective(unstacked), flat, x, fisher='exact').value_and_grad)(flat, x)[2]
  for k in range(3):
    for factor in 'AG':
      close(stats.sums['layers/w'][factor][k], expected.sums[f'w{k}'][factor][0], 1e-5)
  # And the updates are those of the layers apart.
  updates = {}
  for name, c, p in (
    ('stacked', curvature, params),
    ('apart', kron.curvature(objective(unstacked), flat, x, fisher='exact'), flat),
  ):
    _, grads, stats = c.value_and_grad(p, x)
    tx = kron.scale_by_kfac(c, damping=0.01)
    updates[name] = jax.jit(tx.update)(grads, tx.init(p), p, stats=stats)[0]
  for k in range(3):
    close(updates['stacked']['layers']['w'][k], updates['apart'][f'w{k}'], 1e-4)
    close(updates['stacked']['layers']['b'][k], updates['apart'][f'b{k}'], 1e-4)


@pytest.mark.brief('scaled_slope')
@pytest.mark.parametrize('product', [clipped, scaled_slope])
def test_functions_with_a_derivative_rule_of_their_own(product):
  """Gradients are the rule's, factors those of the function's own program."""
  params, x = normals(DENSE), normal(N, 4)
  loss = lambda p, x, product=product: squared(jnp.tanh(product(p['w'], x) + p['b']) @ p['out'])  # noqa: E731
  plainly = lambda p, x: squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out'])  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='exact')
  value, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  expected_value, expected = jax.jit(jax.value_and_grad(loss))(params, x)
  assert value == expected_value
  jax.tree.map(lambda a, b: close(a, b, 1e-6), grads, expected)
  other = jax.grad(plainly)(params, x)
  assert np.abs(other['w'] - grads['w']).max() > 1e-3
  without = jax.jit(kron.curvature(plainly, params, x, fisher='exact').value_and_grad)(params, x)[2]
  close(
    stats.sums['w']['A'][0],
    without.sums['w']['A'][0][:-1, :-1]
    if without.sums['w']['A'].shape != stats.sums['w']['A'].shape
    else without.sums['w']['A'][0],
    1e-5,
  )
  close(stats.sums['w']['G'][0], without.sums['w']['G'][0], 1e-5)


def test_a_kernel_that_cannot_be_seen_is_refused_and_may_be_explained():
  params, x = normals(DENSE), normal(N, 4)
  loss = lambda p, x: squared(jnp.tanh(opaque(p['w'], x) + p['b']) @ p['out'])  # noqa: E731
  with pytest.raises(kron.CurvatureError, match=r"'w' is used by pure_callback at .*test_regions.py:"):
    kron.curvature(loss, params, x, fisher='exact')
  explained = kron.curvature(loss, params, x, fisher='exact', operators={'opaque': lambda w, x: x @ w})
  plainly = lambda p, x: squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out'])  # noqa: E731
  found = jax.jit(explained.value_and_grad)(params, x)
  expected = jax.jit(kron.curvature(plainly, params, x, fisher='exact').value_and_grad)(params, x)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), found[1], expected[1])
  close(found[2].sums['w']['G'], expected[2].sums['w']['G'], 1e-5)
  close(found[2].sums['out']['A'], expected[2].sums['out']['A'], 1e-5)


@pytest.mark.long
def test_a_loss_with_its_own_gradient_takes_its_curvature_from_the_mark():
  """As FermiNet's: the loss is an energy whose gradient is a covariance; curvature is that of log|psi|."""

  def log_psi(p, x):
    return (jnp.tanh(x @ p['w'] + p['b']) @ p['out']).sum(-1)

  def energy(p, x):
    kinetic = jax.vmap(lambda x: jnp.trace(jax.hessian(log_psi, 1)(p, x)) + (jax.grad(log_psi, 1)(p, x) ** 2).sum())(x)
    return -0.5 * kinetic + 0.5 * (x**2).sum(-1)

  @jax.custom_jvp
  def loss(p, x):
    kron.observe.gaussian(log_psi(p, x)[:, None])
    return energy(p, x).mean()

  @loss.defjvp
  def _jvp(primals, tangents):
    (p, x), (dp, _) = primals, tangents
    local = energy(p, x)
    slope = jax.jvp(lambda p: log_psi(p, x), (p,), (dp,))[1]
    return local.mean(), 2 * ((local - local.mean()) * slope).mean()

  params, x = normals(DENSE), normal(N, 4)
  curvature = kron.curvature(loss, params, x, fisher='exact')
  assert len(curvature.blocks) == 2 and not curvature.gradient_only
  value, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  close(value, loss(params, x), 1e-5)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, jax.grad(loss)(params, x))
  observed = lambda p, x: 0.5 * (kron.observe.gaussian(log_psi(p, x)[:, None]) ** 2).mean()  # noqa: E731
  expected = jax.jit(kron.curvature(observed, params, x, fisher='exact').value_and_grad)(params, x)[2]
  jax.tree.map(lambda a, b: close(a, b, 1e-5), stats, expected)


def test_a_mark_inside_of_a_function_with_its_own_rule_under_the_empirical_fisher():
  @jax.custom_jvp
  def loss(p, x):
    return squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out'])

  loss.defjvp(
    lambda primals, tangents: jax.jvp(lambda p, x: squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out']), primals, tangents)
  )
  plainly = lambda p, x: squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out'])  # noqa: E731
  params, x = normals(DENSE), normal(N, 4)
  results = [
    jax.jit(kron.curvature(f, params, x, fisher='empirical').value_and_grad)(params, x) for f in (loss, plainly)
  ]
  jax.tree.map(lambda a, b: close(a, b, 1e-5), *results)


def test_a_mark_inside_of_a_branch_is_refused():
  params, x = normals(DENSE), normal(N, 4)
  network = lambda p, x: dense(p['w'], p['b'], x) @ p['out']  # noqa: E731
  loss = lambda p, x: jax.lax.cond(x.sum() > 0, lambda: squared(network(p, x)), lambda: squared(network(p, -x)))  # noqa: E731
  with pytest.raises(kron.CurvatureError, match=r'observed inside of a branch at .*test_regions.py'):
    kron.curvature(loss, params, x, fisher='exact')


@pytest.mark.long('True-exact', 'False-exact')
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('check_vma', [True, False])
def test_shard_map(fisher, check_vma):
  """The loss of all shards, inside of a shard_map: factors are those of the whole batch."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  params, x = normals({**DENSE, 'scale': (4,)}), normal(8, 4)

  def network(p, x):
    return dense(p['w'], p['b'], x) * p['scale'] @ p['out']

  def local(p, x):
    return jax.lax.pmean(squared(network(p, x)), 'data')

  spec = PartitionSpec
  split = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec(), check_vma=check_vma)
  results = []
  for loss in (split, objective(network)):
    curvature = kron.curvature(loss, params, x, fisher=fisher)
    results.append(jax.jit(curvature.value_and_grad)(params, x))
  assert results[0][2].examples == 8
  jax.tree.map(lambda a, b: close(a, b, 1e-5), results[0], results[1])


def test_a_parameter_that_is_split_inside_of_a_shard_map_is_refused():
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  params, x = {'w': normal(4, 4)}, normal(8, 4)
  spec = PartitionSpec

  def local(p, x):
    return jax.lax.psum(squared(jax.lax.all_gather(x, 'data', axis=0, tiled=True) @ p['w']), 'data')

  loss = jax.shard_map(
    local, mesh=mesh, in_specs=({'w': spec(None, 'data')}, spec('data')), out_specs=spec(), check_vma=False
  )
  with pytest.raises(kron.CurvatureError, match=r"'w' is used by shard_map \(split over the mesh"):
    kron.curvature(loss, params, x, fisher='exact')
