"""K-FAC as an optax optimiser: it solves its damped system, and lives inside what optax and jit offer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from kronmesh.kron import Local
from tests.kron.reference import close

KEY = jax.random.key(0)


def loss_fn(params, x, y, key=None):
  h = jnp.tanh(x @ params['first']['kernel'] + params['first']['bias'])
  h = h * params['norm']['scale'] + params['norm']['shift']
  z = kron.observe.gaussian(h @ params['last']['kernel'])
  return 0.5 * ((z - y) ** 2).sum(-1).mean()


@pytest.fixture
def problem():
  k = jax.random.split(KEY, 5)
  params = {
    'first': {'kernel': jax.random.normal(k[0], (4, 3)), 'bias': jnp.zeros(3)},
    'norm': {'scale': jnp.ones(3), 'shift': jnp.zeros(3)},
    'last': {'kernel': jax.random.normal(k[1], (3, 2))},
  }
  x = jax.random.normal(k[2], (32, 4))
  return params, x, jax.random.normal(k[3], (32, 2))


def test_update_solves_the_damped_system(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  tx = kron.scale_by_kfac(curvature, damping=0.05)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  f = kron.factors(state)
  for name, layer in (('first/kernel', 'first'), ('last/kernel', 'last')):
    a, g = np.asarray(f[name]['A'][0], np.float64), np.asarray(f[name]['G'][0], np.float64)
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    a += pi * np.sqrt(0.05) * np.eye(len(a))
    g += np.sqrt(0.05) / pi * np.eye(len(g))
    u, v = (
      np.concatenate([t[layer]['kernel'], *([t[layer]['bias'][None]] if 'bias' in t[layer] else [])])
      for t in (updates, grads)
    )
    close(np.kron(a, g) @ u.ravel(), v.ravel(), 1e-4)
  u, v = (np.stack([t['norm']['scale'], t['norm']['shift']], -1) for t in (updates, grads))
  block = np.asarray(f['norm/scale']['F']) + 0.05 * np.eye(2)
  close(np.einsum('cij,cj->ci', block, u), v, 1e-4)


def test_moving_averages_are_debiased(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  tx = kron.scale_by_kfac(curvature, decay=0.9)
  state = tx.init(params)
  means, gradients = [], jax.jit(curvature.value_and_grad)
  for part in range(3):
    own = x[part * 8 : part * 8 + 8], y[:8]
    _, grads, stats = gradients(params, *own)
    means.append(stats.sums['last/kernel']['A'][0] / stats.uses['last/kernel']['A'])
    _, state = jax.jit(tx.update)(grads, state, params, stats=stats)
  weights = np.array([0.1 * 0.9**2, 0.1 * 0.9, 0.1])
  expected = sum(w * m for w, m in zip(weights, means, strict=True)) / weights.sum()
  close(kron.factors(state)['last/kernel']['A'][0], expected, 1e-5)


def test_intervals_equal_the_phases_of_a_host_loop(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  by_count = kron.kfac(0.1, curvature, statistics_every=2, inverses_every=3)
  by_phase = kron.kfac(0.1, curvature)
  a = b = params
  state_a, state_b = by_count.init(a), by_phase.init(b)
  gradients = jax.jit(curvature.value_and_grad, static_argnames='statistics')
  update = jax.jit(by_phase.update, static_argnames='phase')
  for step in range(7):
    _, grads, stats = gradients(a, x, y)
    updates, state_a = jax.jit(by_count.update)(grads, state_a, a, stats=stats)
    a = optax.apply_updates(a, updates)
    _, grads, stats = gradients(b, x, y, statistics=step % 2 == 0)
    updates, state_b = update(grads, state_b, b, stats=stats, phase='refresh' if step % 3 == 0 else 'plain')
    b = optax.apply_updates(b, updates)
  jax.tree.map(lambda s, t: close(s, t, 1e-5), a, b)


def step_with(tx, curvature, params, state, *args, **kwargs):
  loss, grads, stats = jax.jit(curvature.value_and_grad)(params, *args, **kwargs)
  updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
  return optax.apply_updates(params, updates), state, loss


def check_types(before, after):
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


WRAPPERS = {
  'plain': lambda c: kron.kfac(0.05, c),
  'schedules': lambda c: kron.kfac(
    optax.cosine_decay_schedule(0.05, 20), c, damping=optax.linear_schedule(0.3, 0.1, 20),
    kl_clip=optax.constant_schedule(0.1),
    decay=optax.constant_schedule(0.9), momentum=optax.linear_schedule(0.5, 0.9, 20),
    weight_decay=optax.constant_schedule(1e-4),
  ),
  'chain': lambda c: optax.chain(optax.clip_by_global_norm(10.0), kron.kfac(0.05, c)),
  'inject_hyperparams': lambda c: optax.inject_hyperparams(kron.kfac)(0.05, c, damping=0.1, inverses_every=2),
  'partition': lambda c: optax.partition(
    {'k': kron.kfac(0.05, c), 'a': optax.adam(0.01)}, {'first': 'k', 'norm': 'a', 'last': 'k'}
  ),
  'masked': lambda c: optax.masked(kron.scale_by_kfac(c), {'first': True, 'norm': False, 'last': True}),
}  # fmt: skip


@pytest.mark.long('plain', 'chain', 'schedules')
@pytest.mark.parametrize('name', WRAPPERS)
def test_an_ordinary_optax_optimiser(problem, name):
  """In jit and scan, under optax's wrappers, with the state's types unchanged; the loss falls."""
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, KEY)
  tx = optax.with_extra_args_support(WRAPPERS[name](curvature))
  if name == 'masked':
    tx = optax.chain(tx, optax.scale(-0.05))
  state = tx.init(params)

  @jax.jit
  def train(params, state, key):
    def body(carry, key):
      params, state, loss = step_with(tx, curvature, *carry, x, y, key)
      return (params, state), loss

    return jax.lax.scan(body, (params, state), jax.random.split(key, 20))

  (_, after), losses = train(params, state, KEY)
  check_types(state, after)
  assert losses[-1] < 0.9 * losses[0], losses


def test_a_constant_schedule_equals_its_number(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  numbers = {'damping': 0.2, 'decay': 0.8, 'momentum': 0.7, 'kl_clip': 1e-3, 'weight_decay': 0.1}
  results = []
  for wrap in (lambda v: v, optax.constant_schedule):
    tx = kron.kfac(wrap(0.1), curvature, **{name: wrap(value) for name, value in numbers.items()})
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
      updates, state = update(grads, state, params, stats=stats)
    results.append(updates)
  jax.tree.map(lambda a, b: close(a, b, 1e-6), *results)


@pytest.mark.long('schedule')
@pytest.mark.parametrize('momentum', [0.5, lambda count: jnp.where(count == 1, 0.5, 0.9)], ids=['number', 'schedule'])
def test_momentum_is_that_of_the_heavy_ball(problem, momentum):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  steps = []
  for m in (0.0, momentum):
    tx = kron.kfac(0.1, curvature, momentum=m)
    first, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    second, _ = jax.jit(tx.update)(grads, state, params, stats=stats)
    steps.append((first, second))
  (first, second), (_, moved) = steps
  jax.tree.map(lambda u, u1, u2: close(u, u2 + 0.5 * u1, 1e-5), moved, first, second)


def test_init_takes_shapes_and_state_leaves_have_names(problem):
  params, x, y = problem
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), (params, x, y))
  curvature = kron.curvature(loss_fn, *shapes, fisher='exact')
  state = kron.scale_by_kfac(curvature).init(shapes[0])
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
  assert ".averages.factors['n5']" in names and '.rejected_inverses' in names
  jax.eval_shape(kron.kfac(0.1, curvature).init, shapes[0])


def test_a_traced_decision_about_statistics(problem):
  """In one compiled program; where no statistics are taken the update ignores the zeros."""
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, KEY)
  tx = kron.scale_by_kfac(curvature)

  @jax.jit
  def update(refresh):
    _, grads, stats = curvature.value_and_grad(params, x, y, KEY, statistics=refresh)
    return jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)

  updates, state = update(False)
  assert all((w == 0).all() for w in state.averages.weights.values()) and state.averages.rejected_statistics == 0
  jax.tree.map(lambda a, b: close(a, b, 1e-6), updates, jax.jit(jax.grad(loss_fn))(params, x, y))
  _, state = update(True)
  assert all((w > 0).any() for w in state.averages.weights.values())


def test_statistics_that_are_not_finite_are_dropped_and_counted(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  tx = kron.scale_by_kfac(curvature)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  _, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  _, _, bad = jax.jit(curvature.value_and_grad)(params, x.at[0, 0].set(jnp.nan), y)
  updates, after = jax.jit(tx.update)(grads, state, params, stats=bad)
  assert after.averages.rejected_statistics > 0
  for name in state.averages.factors:
    np.testing.assert_array_equal(after.averages.factors[name], state.averages.factors[name])
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.long
def test_any_number_of_owners_gives_the_same_update_and_checkpoint(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  results, logical = [], []
  for owners in (1, 2, 5):
    tx = kron.kfac(0.1, curvature, placement=Local(owners))
    _, grads, stats = curvature.value_and_grad(params, x, y)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    results.append(updates)
    logical.append(kron.to_logical(state))
    back = kron.from_logical(logical[0], state)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), kron.to_logical(back), logical[0])
    check_types(state, back)
  for other in results[1:]:
    jax.tree.map(lambda a, b: close(a, b, 1e-5), other, results[0])
  for other in logical[1:]:
    jax.tree.map(lambda a, b: close(a, b, 1e-5), other, logical[0])


def test_the_kl_clip_bounds_the_step(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  inner = kron.scale_by_kfac(curvature, damping=1e-3)
  tx = kron.clip_by_kl(inner, 1e-4, 0.5)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  free, _ = jax.jit(inner.update)(grads, inner.init(params), params, stats=stats)
  product = sum(jnp.vdot(g, u) for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True))
  full = sum(jnp.vdot(g, u) for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(free), strict=True))
  close(state.clip, jnp.sqrt(1e-4 / (0.25 * full)), 1e-4)
  # g.u falls with the clip, u F u with its square; the bound is on the quadratic form.
  close(0.25 * full * state.clip**2, 1e-4, 1e-4)
  assert product < full


ERRORS = {
  'a product of two parameters': (lambda p, x: x @ (p['w'] @ p['v']), 'a computed weight'),
  'a nonlinear kernel': (lambda p, x: x @ jnp.exp(p['w']), 'not a multiple of the parameter'),
  'another kernel under a kernel': (lambda p, x: x @ (p['w'] + jnp.sort(p['v'])), 'part of a computed weight'),
  'two layouts': (lambda p, x: (x @ p['w']) * p['w'][:, 0] @ jnp.sin(x), 'different matrices'),
  'an unknown operation': (lambda p, x: jnp.sort(p['w'])[None] + x[:, None], 'sort'),
  'no axis of examples': (lambda p, x: (x * p['w']).sum(0, keepdims=True) * jnp.ones((3, 1)), 'no leading axis'),
  'a loop of unknown length': (
    lambda p, x: jax.lax.while_loop(lambda h: h.sum() < 9.0, lambda h: h + jnp.abs(h @ p['w']) + 1, x),
    'while',
  ),
  'a kernel for each example': (
    lambda p, x: jnp.einsum('bi,bio->bo', x, p['w'] * x[:, :, None]),
    'scaled along rows and columns',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', ERRORS)
def test_what_is_not_understood_is_named(name):
  network, words = ERRORS[name]
  two = name in ('a product of two parameters', 'another kernel under a kernel')
  params, x = {'layer': {'w': jnp.eye(3)} | ({'v': jnp.eye(3)} if two else {})}, jnp.ones((3, 3))

  def loss(params, x):
    return (kron.observe.gaussian(network(params['layer'], x).reshape(3, -1)) ** 2).mean()

  with pytest.raises(kron.CurvatureError) as error:
    kron.curvature(loss, params, x, fisher='exact')
  message = str(error.value)
  assert "'layer/" in message and words in message and 'test_kfac.py:' in message and '\n' not in message
  for choice in ('gradient', 'diagonal'):
    curvature = kron.curvature(loss, params, x, fisher='exact', fallback={'layer/*': choice})
    assert choice in str(curvature)


@pytest.mark.wrong_types
def test_mistakes_end_in_one_line(problem):
  params, x, y = problem
  plain = lambda p, x: (x @ p['w']).sum()  # noqa: E731
  cases = [
    (lambda: kron.curvature(loss_fn, {**params, 'unused': jnp.ones(3)}, x, y), "'unused' is never used"),
    (lambda: kron.curvature(plain, {'w': jnp.ones((4, 1))}, x), 'mark the network'),
    (lambda: kron.curvature(plain, {'w': jnp.ones((4, 1))}, x, fisher='empirical'), 'counts the observations'),
    (lambda: kron.curvature(loss_fn, params, x, y, fisher='newton'), "fisher='newton'"),
    (lambda: kron.curvature(loss_fn, params, x, y, fallback={'nothing/*': 'gradient'}), 'matches no parameter'),
    (lambda: kron.curvature(lambda p, x: x @ p['w'], {'w': jnp.ones((4, 1))}, x), 'must be one number'),
    (lambda: kron.observe.categorical(jnp.ones((4, 3)), jnp.ones((3,), jnp.int32)), 'targets have shape'),
    (lambda: kron.curvature(loss_fn, params, x, y).value_and_grad(params, x, y), 'pass key='),
  ]
  for call, words in cases:
    with pytest.raises(kron.CurvatureError) as error:
      call()
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_regulariser_is_listed_and_does_not_refuse(problem):
  params, x, y = problem

  def loss(params, x, y):
    return loss_fn(params, x, y) + 0.1 * sum((p**2).sum() for p in jax.tree.leaves(params))

  with_term = kron.curvature(loss, {**params, 'only': jnp.ones(2)}, x, y, fisher='exact')
  assert 'only in terms of its own' in str(with_term)
  without = kron.curvature(loss_fn, params, x, y, fisher='exact')
  _, grads, stats = jax.jit(with_term.value_and_grad)({**params, 'only': jnp.ones(2)}, x, y)
  jax.tree.map(lambda a, b: close(a, b, 1e-6), stats, jax.jit(without.value_and_grad)(params, x, y)[2])
  close(grads['only'], 0.2 * np.ones(2), 1e-6)


def test_a_block_is_not_split_by_a_partition(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  tx = kron.scale_by_kfac(curvature)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  grads['first']['bias'] = optax.MaskedNode()
  with pytest.raises(kron.CurvatureError, match="'first/bias' shares a block"):
    jax.jit(tx.update)(grads, tx.init(params), stats=stats)


def test_donated_states_share_no_buffers(problem):
  params, x, y = problem
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
  tx = kron.kfac(0.1, curvature)
  step = jax.jit(functools.partial(step_with, tx, curvature), donate_argnums=(0, 1))
  new, _, _ = step(jax.tree.map(jnp.copy, params), tx.init(params), x, y)
  assert jax.tree.structure(new) == jax.tree.structure(params)
