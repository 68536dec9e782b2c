"""Types of updates and state, losses of any scale, states that were read back, directions without a gradient."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from kronmesh import kron
from tests.draws import normal
from tests.kron.reference import close

X, Y = normal(32, 4), jnp.arange(32) % 3
PARAMS = {'w': normal(4, 3)}


def loss_fn(p, x, y, scale=1.0):
  z = kron.observe.categorical(x @ p['w'], y)
  return scale * optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


RAMP = optax.linear_schedule(0.5, 0.9, 5)
SCHEDULED = {
  'momentum': lambda c: kron.kfac(0.1, c, momentum=RAMP),
  'learning rate': lambda c: kron.kfac(RAMP, c),
  'weight decay': lambda c: kron.kfac(0.1, c, weight_decay=RAMP),
  'damping, decay, clip': lambda c: kron.kfac(0.1, c, damping=RAMP, decay=RAMP, kl_clip=RAMP),
  'all': lambda c: kron.kfac(RAMP, c, damping=RAMP, decay=RAMP, kl_clip=RAMP, momentum=RAMP, weight_decay=RAMP),
  'injected': lambda c: optax.inject_hyperparams(kron.kfac)(0.1, c, momentum=0.9, weight_decay=0.1),
  'ekfac': lambda c: kron.ekfac(0.1, c, momentum=RAMP, weight_decay=RAMP),
  'stale_kfac': lambda c: kron.stale_kfac(0.1, c, momentum=RAMP, weight_decay=RAMP),
  'kfac_adam': lambda c: kron.kfac_adam(RAMP, c, b1=RAMP, b2=RAMP, weight_decay=RAMP),
}


@pytest.mark.parametrize('name', SCHEDULED)
def test_bfloat16_parameters_in_a_scan(name):
  """Updates have the types of the gradients, and the state keeps its own, whatever is a schedule."""
  params, x = {'w': PARAMS['w'].astype(jnp.bfloat16), 'v': normal(4, 3, seed=2)}, X.astype(jnp.bfloat16)

  def loss(p, x, y):
    z = kron.observe.categorical(x @ p['w'] + x.astype(jnp.float32) @ p['v'], y)
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

  curvature = kron.curvature(loss, params, x, Y, fisher='empirical')
  tx = SCHEDULED[name](curvature)

  def body(carry, _):
    params, state = carry
    basis = kron.basis(state, curvature) if name == 'ekfac' else None
    _, grads, stats = curvature.value_and_grad(params, x, Y, basis=basis)
    updates, state = tx.update(grads, state, params, stats=stats)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grads)
    return (optax.apply_updates(params, updates), state), None

  jax.eval_shape(lambda c: jax.lax.scan(body, c, None, length=2), (params, tx.init(params)))


@pytest.mark.long
def test_scheduled_momentum_is_that_of_numbers():
  curvature = kron.curvature(loss_fn, PARAMS, X, Y, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(PARAMS, X, Y)
  ends = []
  for momentum in (0.7, optax.constant_schedule(0.7)):
    tx = kron.kfac(0.1, curvature, momentum=momentum)
    state = tx.init(PARAMS)
    for _ in range(3):
      updates, state = tx.update(grads, state, PARAMS, stats=stats)
    ends.append(updates)
  jax.tree.map(lambda a, b: close(a, b, 1e-6), *ends)


@pytest.mark.brief('100000000.0', '1000000000000.0')
@pytest.mark.parametrize('scale', [1e-12, 1e-9, 1e-8, 1e8, 1e11, 1e12])
@pytest.mark.filterwarnings('ignore:the loss is about')
def test_the_scale_of_a_loss(scale):
  """The loss times c and the damping times c^2 make the update 1/c as long."""
  updates = []
  for c in (1.0, scale):
    loss = lambda p, x, y, c=c: loss_fn(p, x, y, c)  # noqa: E731
    curvature = kron.curvature(loss, PARAMS, X, Y, fisher='empirical')
    tx = kron.scale_by_kfac(curvature, damping=1e-2 * c**2)
    _, grads, stats = jax.jit(curvature.value_and_grad)(PARAMS, X, Y)
    u, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, stats=stats)
    assert state.rejected_inverses == state.redamped_inverses == 0
    updates.append(c * u['w'])
  close(updates[1], updates[0], 1e-5)


@pytest.mark.brief('False')
@pytest.mark.parametrize('x64', [False, True])
def test_adam_in_the_eigenbasis_stays_where_no_gradient_is(x64):
  """The rows of a softmax's gradient sum to zero: along that sum nothing moves."""
  jax.config.update('jax_enable_x64', x64)
  try:
    dtype = jnp.float64 if x64 else jnp.float32
    params, x = {'w': jnp.asarray(normal(4, 3), dtype)}, jnp.asarray(X[:8], dtype)
    curvature = kron.curvature(loss_fn, params, x, Y[:8], fisher='empirical')
    tx = kron.kfac_adam(0.05, curvature)

    @jax.jit
    def step(p, state):
      _, grads, stats = curvature.value_and_grad(p, x, Y[:8])
      updates, state = tx.update(grads, state, p, stats=stats)
      return optax.apply_updates(p, updates), state

    p, state = params, tx.init(params)
    for _ in range(30):
      p, state = step(p, state)
    moved = np.asarray(p['w'] - params['w'], np.float64)
    assert np.linalg.norm(moved) > 1
    assert np.linalg.norm(moved.sum(1)) < 100 * float(jnp.finfo(dtype).eps) * np.linalg.norm(moved)
  finally:
    jax.config.update('jax_enable_x64', False)


BACK = {
  'flax.serialization': lambda new, state: serialization.from_bytes(new, serialization.to_bytes(state)),
  'pickle': lambda new, state: pickle.loads(pickle.dumps(jax.device_get(state))),
  'device_get': lambda new, state: jax.device_get(state),
  'a tree of lists': lambda new, state: jax.tree.unflatten(
    jax.tree.structure(new), [np.asarray(x) for x in jax.tree.leaves(state)]
  ),
}


def kept():
  curvature = kron.curvature(loss_fn, PARAMS, X, Y, fisher='exact')
  tx, keep = kron.kfac(0.1, curvature), kron.inverse_schedule(curvature)
  stats = jax.jit(curvature.value_and_grad)(PARAMS, X, Y)[2]
  return tx, keep, keep.take(tx.init(PARAMS), stats)


@pytest.mark.long('flax.serialization', 'a tree of lists', 'device_get')
@pytest.mark.parametrize('name', BACK)
def test_inverses_of_a_state_that_was_read_back(name):
  tx, keep, state = kept()
  back = BACK[name](tx.init(PARAMS), state)
  found = kron.find_state(keep.refresh(back, 0, everything=True)).inverses
  right = kron.find_state(keep.refresh(state, 0, everything=True)).inverses
  jax.tree.map(np.testing.assert_array_equal, found, right)


@pytest.mark.brief('jit')
@pytest.mark.parametrize('around', ['vmap', 'jit'])
def test_inverses_inside_of_other_transformations(around):
  _, keep, state = kept()
  if around == 'jit':
    found = jax.jit(lambda s: keep.refresh(s, 0))(state)
  else:
    pairs = jax.vmap(lambda s: keep.refresh(s, 0))(jax.tree.map(lambda a: jnp.stack([a, a]), state))
    found = jax.tree.map(lambda a: a[1], pairs)
  right = keep.refresh(state, 0)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
