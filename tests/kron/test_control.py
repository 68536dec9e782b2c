"""Damping, learning rate and momentum from the quadratic model, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from kronmesh import kron
from tests.kron.gallery import cross_entropy
from tests.kron.reference import close, exact_fisher

pytestmark = pytest.mark.usefixtures('x64')


def network(params, x):
  return jnp.tanh(x @ params['in'] + params['b']) @ params['out']


def make():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {'in': jax.random.normal(keys[0], (4, 5)), 'b': jnp.zeros(5), 'out': jax.random.normal(keys[1], (5, 3))}
  x, y = jax.random.normal(keys[2], (32, 4)), jax.random.randint(keys[3], (32,), 0, 3)

  def loss(params, x, y):
    return cross_entropy(network(params, x), y)

  return loss, params, (x, y), kron.curvature(loss, params, x, y, fisher='exact')


def softmax_root(z):
  p = jax.nn.softmax(z)
  return (jnp.diag(jnp.sqrt(p)) - jnp.outer(jnp.sqrt(p), p)).astype(z.dtype)


@pytest.mark.long
def test_the_step_minimises_the_model():
  _, params, args, curvature = make()
  damping, l2 = 3e-2, 1e-2
  tx = kron.quadratic_step(kron.scale_by_kfac(curvature, damping=damping), damping=damping, l2=l2)

  @jax.jit
  def step(params, state):
    _, grads, stats = curvature.value_and_grad(params, *args)
    return grads, *tx.update(grads, state, params, stats=stats, products=curvature.products(params, *args))

  state, previous = tx.init(params), np.zeros(sum(p.size for p in params.values()))
  for i in range(3):
    natural = kron.scale_by_kfac(curvature, damping=damping)
    _, grads, stats = curvature.value_and_grad(params, *args)
    delta = -ravel_pytree(jax.jit(natural.update)(grads, state.inner, params, stats=stats)[0])[0]
    f = exact_fisher(network, params, args[0], softmax_root) + (damping + l2) * np.eye(delta.size)
    directions = np.stack([delta, previous] if i else [delta], 1)
    g = ravel_pytree(grads)[0]
    best = -np.linalg.solve(directions.T @ f @ directions, directions.T @ g)
    _, updates, state = step(params, state)
    close(ravel_pytree(updates)[0], directions @ best, 1e-8)
    close(state.learning_rate, best[0], 1e-6)
    close(state.momentum, best[1] if i else 0.0, 1e-6)
    params, previous = optax.apply_updates(params, updates), directions @ best


@pytest.mark.long
def test_without_momentum_and_with_a_schedule():
  _, params, args, curvature = make()
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, *args)
  products = lambda: curvature.products(params, *args)  # noqa: E731
  steps = {}
  for name, settings in {
    'plain': {},
    'alone': {'use_momentum': False},
    'shorter': {'scale': optax.constant_schedule(0.25)},
  }.items():
    tx = kron.quadratic_step(kron.scale_by_kfac(curvature), **settings)
    state, update = tx.init(params), jax.jit(lambda *args, tx=tx: tx.update(*args, stats=stats, products=products))
    for _ in range(2):
      steps[name], state = update(grads, state, params)
  first = kron.quadratic_step(kron.scale_by_kfac(curvature))
  update = jax.jit(lambda *args: first.update(*args, stats=stats, products=products))
  once, _ = update(grads, first.init(params), params)
  flat = lambda tree: ravel_pytree(tree)[0]  # noqa: E731
  close(flat(steps['alone']), flat(once), 1e-9)
  # The gradient and factors are the same again, so the best step lies along the last one: momentum adds nothing.
  close(flat(steps['plain']), flat(once), 1e-9)
  close(flat(steps['shorter']), flat(once) / 4, 1e-9)


@pytest.mark.long
def test_the_clip_bounds_the_divergence_of_a_step():
  _, params, args, curvature = make()
  products = lambda: curvature.products(params, *args)  # noqa: E731
  f = exact_fisher(network, params, args[0], softmax_root)

  def second(kl_clip, scale=1.0):
    tx = kron.quadratic_step(kron.scale_by_kfac(curvature), kl_clip=kl_clip, scale=scale)
    state = tx.init(params)
    for p in (params, jax.tree.map(lambda x: 0.9 * x, params)):  # the second step has two directions
      _, grads, stats = jax.jit(curvature.value_and_grad)(p, *args)
      updates, state = jax.jit(lambda *args, stats: tx.update(*args, stats=stats, products=products))(
        grads, state, p, stats=stats
      )
    return np.asarray(ravel_pytree(updates)[0]), state

  (free, _), (wide, unclipped) = second(None), second(1e3)
  np.testing.assert_array_equal(wide, free)
  assert unclipped.clip == 1
  step, state = second(optax.constant_schedule(1e-4))
  close(step @ f @ step, 1e-4, 1e-8)
  assert 0 < state.clip < 1
  # The clip is of the whole step, its scale included.
  close(second(1e-4, scale=0.5)[0] @ f @ second(1e-4, scale=0.5)[0], 1e-4, 1e-8)
  tx = kron.adaptive_kfac(curvature, kl_clip=1e-4)
  value, grads, stats = jax.jit(curvature.value_and_grad)(params, *args)
  given = {'products': products, 'value': value, 'value_fn': lambda p: value}
  updates, _ = jax.jit(lambda *args: tx.update(*args, stats=stats, **given))(grads, tx.init(params), params)
  step = ravel_pytree(updates)[0]
  close(step @ f @ step, 1e-4, 1e-8)


@pytest.mark.brief('True')
@pytest.mark.parametrize('lazy', [False, True])
def test_damping_follows_the_ratio(lazy):
  loss, params, args, curvature = make()
  damping = 0.5
  tx = kron.adapt_damping(kron.quadratic_step(kron.scale_by_kfac(curvature)), damping, every=2, rate=0.9)
  value, grads, stats = jax.jit(curvature.value_and_grad)(params, *args)
  products = curvature.products(params, *args)
  given = (lambda: products) if lazy else products

  def after(value_fn, steps):
    state = tx.init(params)
    update = jax.jit(lambda *a: tx.update(*a, stats=stats, products=given, value=value, value_fn=value_fn))
    for _ in range(steps):
      updates, state = update(grads, state, params)
    return updates, state

  truth = lambda p: loss(p, *args)  # noqa: E731
  _, early = after(truth, 1)
  assert early.damping == damping and early.ratio == 1  # not yet due
  updates, state = after(truth, 2)
  d, g = ravel_pytree(updates)[0], ravel_pytree(grads)[0]
  f = exact_fisher(network, params, args[0], softmax_root) + damping * np.eye(d.size)
  predicted = g @ d + d @ f @ d / 2
  close(state.ratio, (truth(optax.apply_updates(params, updates)) - value) / predicted, 1e-6)
  assert state.ratio > 0.75
  close(state.damping, damping * 0.9**2, 1e-6)
  for name, value_fn in {
    'as foretold in half': lambda p: value + predicted / 2,
    'a tenth': lambda p: value + predicted / 10,
    'uphill': lambda p: value + 1,
    'infinite': lambda p: jnp.inf,
    'no number': lambda p: jnp.nan,
  }.items():
    moved = 1 if name == 'as foretold in half' else 1 / 0.9**2
    close(after(value_fn, 2)[1].damping, damping * moved, 1e-6)


def test_bounds_and_what_the_inner_link_gets():
  seen = []

  def update(updates, state, params=None, *, damping=None, **extra):
    seen.append(float(damping))
    return jax.tree.map(lambda u: -0.1 * u, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  _, params, args, curvature = make()
  value, grads, _ = curvature.value_and_grad(params, *args, statistics=False)
  products = curvature.products(params, *args)
  for value_fn, expected in ((lambda p: jnp.inf, [1, 2, 3, 3]), (lambda p: value - 1e3, [1, 0.5, 0.4, 0.4])):
    seen.clear()
    tx = kron.adapt_damping(inner, 1.0, every=1, rate=optax.constant_schedule(0.5), smallest=0.4, largest=3.0)
    state = tx.init(params)
    for _ in range(4):
      _, state = tx.update(grads, state, params, value=value, value_fn=value_fn, products=products)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.long
def test_adaptive_kfac_needs_no_tuning():
  """From dampings a million times apart the same convex problem is solved."""
  l2, x = 1e-2, jax.random.normal(jax.random.key(0), (32, 6)) * jnp.logspace(-1, 1, 6)
  y = jnp.arange(32) % 3
  loss = lambda p: cross_entropy(x @ p['w'] + p['b'], y) + l2 / 2 * optax.tree.norm(p, squared=True)  # noqa: E731
  params = {'w': jnp.zeros((6, 3)), 'b': jnp.zeros(3)}
  curvature = kron.curvature(loss, params, fisher='exact')
  best = params
  for _ in range(12):  # Newton's method
    matrix = jax.hessian(lambda v: loss(ravel_pytree(params)[1](v)))(ravel_pytree(best)[0])
    step = jnp.linalg.solve(matrix, ravel_pytree(jax.grad(loss)(best))[0])
    best = ravel_pytree(params)[1](ravel_pytree(best)[0] - step)
  for damping in (1e-4, 1e2):
    tx = kron.adaptive_kfac(curvature, damping=damping, damping_every=1, damping_rate=0.7, l2=l2)

    def step(carry, _, tx=tx):
      p, state = carry
      value, grads, stats = curvature.value_and_grad(p)
      products = curvature.products(p)
      updates, state = tx.update(grads, state, p, stats=stats, products=products, value=value, value_fn=loss)
      return (optax.apply_updates(p, updates), state), None

    (p, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 80)
    close(ravel_pytree(p)[0], ravel_pytree(best)[0], 1e-4)


def test_products_of_another_fisher():
  loss, params, args, _ = make()
  sampled = kron.curvature(loss, params, *args, fisher='sampled')
  v = jax.tree.map(jnp.ones_like, params)
  found = sampled.products(params, *args, fisher='exact').fisher(v)
  f = exact_fisher(network, params, args[0], softmax_root)
  close(ravel_pytree(found)[0], f @ ravel_pytree(v)[0], 1e-9)
  with pytest.raises(kron.CurvatureError, match="fisher='sample' is unknown"):
    sampled.products(params, *args, fisher='sample')


@pytest.mark.long
def test_what_is_missing_is_named():
  loss, params, args, curvature = make()
  tx = kron.adaptive_kfac(curvature)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, *args)
  with pytest.raises(kron.CurvatureError, match='value=loss'):
    jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  with pytest.raises(kron.CurvatureError, match='products='):
    tx.update(grads, tx.init(params), params, stats=stats, value=1.0, value_fn=lambda p: loss(p, *args))
