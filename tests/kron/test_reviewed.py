"""Programs that a reading of the source found to go wrong once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.gallery import N, cross_entropy, layer_norm, squared, tokens
from tests.kron.reference import close
from tests.kron.unrolled import check


def test_a_bias_beside_a_scaled_kernel_keeps_its_own_scale(x64):
  """Without damping to speak of, its update does not depend on the scale of the rows beside it."""
  params = normals({'w': (4, 5), 'b': (5,), 'v': (5, 6)}, dtype=jnp.float64)
  x = normal(N, 4, dtype=jnp.float64)
  params['w'] = 10 * params['w']
  updates = []
  for scaled in (True, False):
    w = params['w'] / jnp.linalg.norm(params['w'])

    def loss(p, x, scaled=scaled):
      w = p['w'] / jnp.linalg.norm(p['w']) if scaled else p['w']
      return squared(jnp.tanh(x @ w + p['b']) @ p['v'])

    p = params if scaled else {**params, 'w': w}
    curvature = kron.curvature(loss, p, x, fisher='empirical')
    _, _, stats = jax.jit(curvature.value_and_grad)(p, x)
    grads = {'w': jnp.zeros((4, 5)), 'b': jnp.ones(5), 'v': jnp.zeros((5, 6))}
    tx = kron.scale_by_kfac(curvature, damping=1e-18)
    updates.append(jax.jit(tx.update)(grads, tx.init(p), p, stats=stats)[0]['b'])
    # The bias's own entry of A x G: uses times G.
    close(stats.sums['w']['A'][0, -1, -1], N, 1e-6)
  close(updates[0], updates[1], 1e-3)


REFUSED = {
  'a branch that returns a parameter': (
    lambda p, x: jax.lax.cond(x[0, 0] > 9, lambda h: h, lambda h: jnp.broadcast_to(p['s'], h.shape), x @ p['w']), 'cond',
  ),
  'a gate of a kernel by another layer': (
    lambda p, x: x @ (p['w'] * jax.nn.sigmoid(x.mean(0) @ p['u'])) + p['s'], 'other than by scaling a weight'
  ),
  'a scalar in a loop over examples': (
    lambda p, x: jax.lax.map(lambda x: (x @ p['w']).sum() - jnp.log(jnp.exp(p['s']).sum()), x)[:, None], "'s' is used by",
  ),
  'a kernel made of itself': (lambda p, x: x @ (p['w'] - p['w'].mean(0)) + p['s'], 'not a multiple of the parameter'),
  'types that the program knows': (
    lambda p, x: (jnp.tanh(jnp.tile(x @ p['w'], (2, 1))) + p['t'][np.repeat([0, 1], N)]).reshape(2, N, 5).mean(0), "'t'",
  ),
  'a complex kernel': (lambda p, x: jnp.abs(x @ (p['w'] + 1j * p['v'])) + p['s'], "'v'|'w'"),
}  # fmt: skip


ALSO = {'a gate of a kernel by another layer': 'u', 'types that the program knows': 't', 'a complex kernel': 'v'}


@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, fisher):
  network, words = REFUSED[name]
  shapes = {'w': (4, 5), 's': (5,), 'u': (4, 5), 't': (2, 5), 'v': (4, 5)}
  used = {'w', ALSO.get(name, 's')} | ({'s'} if name != 'types that the program knows' else set())
  params = normals({k: s for k, s in shapes.items() if k in used})
  with pytest.raises(kron.CurvatureError, match=words):
    kron.curvature(lambda p, x: squared(network(p, x)), params, normal(N, 4), fisher=fisher)


def test_one_hot_of_a_table_with_scaled_rows():
  params, ids = {'e': normal(11, 4)}, tokens()
  rows = lambda e: e / jnp.linalg.norm(e, axis=1, keepdims=True)  # noqa: E731
  loss = lambda p, ids: squared(jnp.sin(jax.nn.one_hot(ids, 11) @ rows(p['e'])))  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, ids, fisher='empirical').value_and_grad)(params, ids)[2]
  counts = np.bincount(np.asarray(ids).reshape(-1), minlength=11)
  close(stats.sums['e']['A'].reshape(-1), counts / np.asarray((params['e'] ** 2).sum(1)), 1e-5)


def test_a_scale_read_twice():
  params, x = {'s': jnp.abs(normal(4))}, normal(N, 2, 4)

  def loss(p, x):
    h = x * p['s']
    v = (h.swapaxes(1, 2) * jnp.cos(x).swapaxes(1, 2)).sum(2)
    return squared(jnp.tanh(h).sum(1) + v)

  curvature = kron.curvature(loss, params, x, fisher='empirical')
  assert check(curvature, loss, params, (x,), N) == 1


def test_layers_that_do_not_run_equally_often():
  params, x = {'w': normal(2, 4, 4, scale=0.5), 'out': normal(4, 2)}, normal(N, 4)

  def loss(p, x):
    layer = lambda h, w: (jax.lax.cond(w[0], lambda h: jnp.tanh(h @ w[1]), lambda h: h, h), None)  # noqa: E731
    return squared(jax.lax.scan(layer, x, (jnp.array([True, False]), p['w']))[0] @ p['out'])

  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  np.testing.assert_array_equal(stats.uses['w']['A'].reshape(-1), [N, 0])
  close(stats.means('w')['A'][0], x.T @ x / N, 1e-5)


def test_flattened_logits_count_tokens_and_norms_count_sequences():
  params, x = normals({'e': (11, 4), 's': (4,), 't': (4,), 'head': (4, 11)}), tokens()

  def loss(p, x):
    h = layer_norm(p['e'][x], p['s'], p['t'])
    return cross_entropy((h @ p['head']).reshape(-1, 11), x.reshape(-1))

  curvature = kron.curvature(loss, params, x, fisher='empirical')
  assert jax.jit(curvature.value_and_grad)(params, x)[2].examples == N * 5 and len(curvature.blocks) == 3


@pytest.mark.long
def test_a_stack_with_gains_that_a_loop_slices():
  params = normals({'w': (3, 4, 4), 'g': (3, 4), 'out': (4, 2)})
  x = normal(N, 4)

  def stacked(p, x):
    w = p['w'] * p['g'][:, None, :]
    return squared(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] @ p['out'])

  def unstacked(p, x):
    for k in range(3):
      x = jnp.tanh(x @ (p['w'][k] * p['g'][k]))
    return squared(x @ p['out'])

  found, expected = (
    kron.curvature(f, params, x, fisher='empirical').value_and_grad(params, x)[2] for f in (stacked, unstacked)
  )
  close(found.sums['g']['F'][:4], expected.sums['g']['F'], 1e-5)
  close(found.sums['w']['G'][1], expected.sums['w[1]']['G'][0], 1e-5)


def test_functions_with_rules_of_scaled_kernels_in_regions():
  @jax.custom_vjp
  def product(w, x):
    return x @ w

  product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
  params, x = {'w': normal(4, 3)}, normal(N, 4)
  results = []
  for f in (product, lambda w, x: x @ w):
    loss = lambda p, x, f=f: squared(jax.checkpoint(lambda p, x: f(p['w'] / jnp.linalg.norm(p['w']), x))(p, x))  # noqa: E731
    results.append(jax.jit(kron.curvature(loss, params, x, fisher='exact').value_and_grad)(params, x))
  jax.tree.map(lambda a, b: close(a, b, 1e-5), *results)


def test_odd_parameters():
  x = normal(N, 4)
  cases = [
    (
      {'a': {'b': normal(4, 2)}, 'a/b': normal(4, 2)},
      lambda p, x: x @ p['a']['b'] + x @ p['a/b'],
      "two parameters are called 'a/b'",
    ),
    ({}, lambda p, x: x, 'there are no parameters'),
  ]  # fmt: skip
  for params, network, words in cases:
    with pytest.raises(kron.CurvatureError, match=words):
      kron.curvature(lambda p, x, f=network: squared(f(p, x)), params, x, fisher='exact')
  params = {'w': normal(4, 2), 'none': jnp.zeros((4, 0)), 'number': 1.5}
  loss = lambda p, x: squared(jnp.concatenate([x @ p['w'] * p['number'], x @ p['none']], -1))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='exact')
  assert curvature.gradient_only == {'none': 'it has no entries'}
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  tx = kron.kfac(0.1, curvature)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  assert updates['none'].shape == (4, 0) and np.isfinite(updates['number'])


def test_a_scale_joined_from_two_parameters():
  params, x = {'a': jnp.ones(2), 'b': jnp.ones(3) * 2, 'w': normal(5, 2)}, normal(N, 5)
  loss = lambda p, x: squared(jnp.tanh(x * jnp.concatenate([p['a'], p['b']])) @ p['w'])  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  tx = kron.scale_by_kfac(curvature)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  assert updates['a'].shape == (2,) and updates['b'].shape == (3,)
