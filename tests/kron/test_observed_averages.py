"""An average moves only by what was observed: heads, experts and modalities that some batches do not use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.reference import close

X, Y = normal(16, 4), normal(16, 3, seed=3)
PARAMS = normals({'a': (4, 3), 'b': (4, 3)})


def half(z, y=0.0):
  return 0.5 * ((z - y) ** 2).sum(-1).mean()


def branch(p, x, y, first):
  return half(kron.observe.gaussian(jax.lax.cond(first, lambda: x @ p['a'], lambda: x @ p['b'])), y)


def switch(p, x, y, first):
  heads = [lambda: x @ p['a'], lambda: x @ p['b'], lambda: 2 * x @ p['b']]
  return half(kron.observe.gaussian(jax.lax.switch(jnp.where(first, 0, 1), heads)), y)


def modality(p, x, y, first):
  """Returns the loss of a batch in which one of two inputs is missing; its rows do not count as uses."""
  there = jnp.full((16, 1), first)
  z = kron.used(x, there) @ p['a'] * there + kron.used(x, ~there) @ p['b'] * ~there
  return half(kron.observe.gaussian(z), y)


def layers(p, x, y, first):
  """A scan over two heads that runs one of them."""
  step = lambda z, w: (z + jax.lax.cond(w[1], lambda: x @ w[0], lambda: jnp.zeros((16, 3))), None)  # noqa: E731
  z = jax.lax.scan(step, jnp.zeros((16, 3)), (p['both'], jnp.stack([first, ~first])))[0]
  return half(kron.observe.gaussian(z), y)


LOSSES = {f.__name__: f for f in (branch, switch, modality, layers)}
EXPERTS = {'w': normal(2, 4, 3)}


def routed(p, x, y, first):
  """All tokens go to one of two experts."""
  there = jnp.broadcast_to(jnp.stack([first, ~first])[:, None, None], (2, 16, 1))
  tokens = kron.used(jnp.broadcast_to(x, (2, 16, 4)), there)
  return half(kron.observe.gaussian((jnp.einsum('end,edc->enc', tokens, p['w']) * there).sum(0)), y)


def held(loss, params, optimizer, steps=400):
  curvature = kron.curvature(loss, params, X, Y, True, fisher='exact')
  tx = optimizer(curvature)

  @jax.jit
  def step(state, first):
    _, grads, stats = curvature.value_and_grad(params, X, Y, first, key=jax.random.key(0))
    return tx.update(grads, state, params, stats=stats)[1]

  state = tx.init(params)
  for i in range(steps):
    state = step(state, jnp.asarray(i % 8 == 0))
  return kron.factors(state)


@pytest.mark.brief('modality', 'switch')
@pytest.mark.parametrize('name', LOSSES)
def test_a_head_that_one_batch_in_eight_uses(name):
  """A is the mean over its uses, G that over all examples: the product of both is the mean curvature of all batches."""
  params = {'both': jnp.stack([PARAMS['a'], PARAMS['b']])} if name == 'layers' else PARAMS
  factors = held(LOSSES[name], params, functools.partial(kron.scale_by_kfac, damping=1e-3, decay=0.95))
  rows = X.T @ X / 16
  if name == 'layers':
    a, b = ({k: f[i] for k, f in factors['both'].items()} for i in range(2))
  else:
    a, b = ({k: f[0] for k, f in factors[k].items()} for k in 'ab')
  close(a['A'], rows, 1e-5)
  if name != 'switch':
    close(b['A'], rows, 1e-5)
  share = np.trace(a['G']) / 3
  assert 0.09 < share < 0.15, share  # an eighth, as the weights of the last eight steps fade
  close(a['G'], share * np.eye(3), 1e-5)


@pytest.mark.brief('scale_by_kfac_adam')
@pytest.mark.parametrize('name', ['scale_by_kfac', 'scale_by_ekfac', 'scale_by_kfac_adam', 'scale_by_stale_kfac'])
def test_every_optimiser_keeps_what_was_not_observed(name):
  """After a batch that uses the first head only, the second head's factor of inputs is what it was."""
  curvature = kron.curvature(branch, PARAMS, X, Y, True, fisher='exact')
  tx = getattr(kron, name)(curvature)
  state = tx.init(PARAMS)

  def step(state, first, x):
    basis = kron.basis(state, curvature) if name == 'scale_by_ekfac' else None
    _, grads, stats = curvature.value_and_grad(PARAMS, x, Y, jnp.asarray(first), basis=basis)
    return tx.update(grads, state, PARAMS, stats=stats)[1]

  both = step(step(state, True, X), False, X)
  after = step(step(both, True, 3 * X), True, 5 * X)
  close(kron.factors(after)['b']['A'], kron.factors(both)['b']['A'], 1e-6)
  assert np.linalg.norm(kron.factors(after)['a']['A'] - kron.factors(both)['a']['A']) > 1


def test_an_inverse_schedule_keeps_what_was_not_observed():
  curvature = kron.curvature(branch, PARAMS, X, Y, True, fisher='exact')
  tx, keep = kron.kfac(0.1, curvature), kron.inverse_schedule(curvature)
  state = tx.init(PARAMS)
  for first in (True, False, True, True):
    state = keep.take(state, curvature.value_and_grad(PARAMS, X, Y, jnp.asarray(first))[2])
  for name in 'ab':
    close(kron.factors(state)[name]['A'][0], X.T @ X / 16, 1e-5)


def test_experts_without_tokens():
  """By slot: the expert that got none keeps its factor, the other one's moves."""
  factors = held(routed, EXPERTS, functools.partial(kron.scale_by_kfac, damping=1e-3, decay=0.95), steps=80)['w']
  for e in range(2):
    close(factors['A'][e], X.T @ X / 16, 1e-5)
  assert np.trace(factors['G'][0]) < 0.2 * np.trace(factors['G'][1])


@pytest.mark.long
def test_a_kernel_used_transposed_by_some_batches():
  """Its two factors keep the mean curvature of all batches: the rows' average waits, the columns' takes the zeros in."""

  def loss(p, x, y, first):
    h = jax.lax.cond(first, lambda: jnp.tanh(x @ p['w']) @ p['w'].T, lambda: x @ p['b'])
    return half(kron.observe.gaussian(h))

  params, state = normals({'w': (4, 3), 'b': (4, 4)}), None
  curvature = kron.curvature(loss, params, X, Y, True, fisher='exact')
  tx = kron.scale_by_kfac(curvature, decay=0.5)
  traces = []
  for order in ((True,), (True, False)):
    state = tx.init(params)
    for first in order:
      _, grads, stats = curvature.value_and_grad(params, X, Y, jnp.asarray(first))
      state = tx.update(grads, state, params, stats=stats)[1]
    factors = kron.factors(state)['w']
    traces.append((np.trace(factors['A'][0]), np.trace(factors['G'][0])))
  close(traces[1][0], traces[0][0], 1e-5)
  close(traces[1][1], traces[0][1] / 3, 1e-5)  # weights 1/4 and 1/2 of the first and the second batch
