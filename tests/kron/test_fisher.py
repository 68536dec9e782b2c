"""Blocks equal the exact Fisher where theory says so; the sampled Fisher agrees within its sampling error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.kron.reference import close, exact_fisher

KEY = jax.random.key(0)


def linear_network(params, x):
  """Deep and linear: K-FAC's factorisation is exact for squared error (Bernacchia et al. 2018)."""
  for layer in params.values():
    x = x @ layer['kernel'] + layer['bias']
  return x


def linear_problem(dtype, n=16):
  sizes = [4, 5, 3, 2]
  keys = jax.random.split(KEY, len(sizes))
  params = {
    f'layer{i}': {'kernel': jax.random.normal(k, (a, b), dtype), 'bias': jax.random.normal(k, (b,), dtype)}
    for i, (k, a, b) in enumerate(zip(keys[:-1], sizes[:-1], sizes[1:], strict=True))
  }
  return params, jax.random.normal(keys[-1], (n, 4), dtype)


def loss_fn(params, x, key=None, observe=kron.observe.gaussian, network=linear_network):
  z = observe(network(params, x))
  return 0.5 * (z**2).sum(-1).mean()


def block_of(stats, name):
  """A x G over the homogeneous matrix (inputs and a last row for the bias)."""
  a = stats.sums[name]['A'][0] / stats.uses[name]['A']
  g = stats.sums[name]['G'][0] / stats.examples
  return np.kron(a, g)


def dense_block(network, params, x, root, layer):
  def only(own, xi):
    return network({**params, layer: {'kernel': own[:-1], 'bias': own[-1]}}, xi)

  own = jnp.concatenate([params[layer]['kernel'], params[layer]['bias'][None]])
  return exact_fisher(only, own, x, root)


def check_deep_linear(dtype, tolerance):
  params, x = linear_problem(dtype)
  stats = jax.jit(kron.curvature(loss_fn, params, x, fisher='exact').value_and_grad)(params, x)[2]
  for layer in params:
    expected = dense_block(linear_network, params, x, lambda z: jnp.eye(z.size, dtype=dtype), layer)
    close(block_of(stats, f'{layer}/kernel'), expected, tolerance)


@pytest.mark.long
def test_deep_linear_network_in_f32():
  check_deep_linear(jnp.float32, 1e-4)


def test_deep_linear_network_in_f64(x64):
  check_deep_linear(jnp.float64, 1e-10)


def tanh_network(params, x):
  return jnp.tanh(x @ params['kernel'] + params['bias']) @ jnp.arange(6.0).reshape(3, 2)


LIKELIHOODS = {
  'gaussian': (kron.observe.gaussian, lambda z: jnp.eye(z.size)),
  'gaussian of variance 1/2': (
    functools.partial(kron.observe.gaussian, variance=0.5),
    lambda z: jnp.sqrt(2) * jnp.eye(z.size),
  ),
  'categorical': (
    kron.observe.categorical,
    lambda z: _cholesky(jnp.diag(jax.nn.softmax(z)) - jnp.outer(jax.nn.softmax(z), jax.nn.softmax(z))),
  ),
  'bernoulli': (kron.observe.bernoulli, lambda z: jnp.diag(jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)))),
}


def _cholesky(f):
  """A root of a matrix that is only semidefinite, as rows."""
  values, vectors = jnp.linalg.eigh(f)
  return jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T


@pytest.mark.long('gaussian of variance 1/2')
@pytest.mark.parametrize('name', LIKELIHOODS)
def test_exact_and_sampled_fisher_of_every_likelihood(name):
  """G of a single example: no factorisation is involved, so F = aaT x G exactly."""
  observe, root = LIKELIHOODS[name]
  params = {'kernel': jax.random.normal(KEY, (4, 3)) * 0.5, 'bias': jnp.zeros(3)}
  x = jax.random.normal(jax.random.key(1), (1, 4))
  network = lambda p, x: tanh_network(p, x) * 0.3  # noqa: E731
  loss = functools.partial(loss_fn, observe=observe, network=network)
  homogeneous = lambda own, x: network({'kernel': own[:-1], 'bias': own[-1]}, x)  # noqa: E731
  own = jnp.concatenate([params['kernel'], params['bias'][None]])
  expected = exact_fisher(homogeneous, own, x, root)
  exact = jax.jit(kron.curvature(loss, params, x, fisher='exact').value_and_grad)(params, x)[2]
  close(block_of(exact, 'kernel'), expected, 1e-5)

  # The same example many times over: its sampled G is a mean over n draws, whose error falls as 1/sqrt(n).
  n = 20_000
  many = jnp.broadcast_to(x, (n, 4))
  sampled = jax.jit(kron.curvature(loss, params, many, KEY).value_and_grad)(params, many, KEY)[2]
  close(block_of(sampled, 'kernel'), expected, 5 / np.sqrt(n))


def test_exact_fisher_of_coupled_examples_is_unbiased():
  """With BatchNorm-like coupling the signs make the exact Fisher's mean equal one pass per example and column."""
  x = jax.random.normal(KEY, (4, 3))
  params = {'kernel': jax.random.normal(jax.random.key(1), (3, 2))}

  def network(kernel_copies, x):
    y = jnp.einsum('bi,bio->bo', x, kernel_copies)
    return jnp.tanh(y - y.mean(0))

  def loss(params, x):
    y = x @ params['kernel']
    return 0.5 * (kron.observe.gaussian(jnp.tanh(y - y.mean(0))) ** 2).sum(-1).mean()

  copies = jnp.broadcast_to(params['kernel'], (4, 3, 2))
  jacobian = jax.jacobian(network)(copies, x)  # (j, z, i, in, out): every copy's effect on every output
  curvature = kron.curvature(loss, params, x, fisher='exact')
  draw = jax.jit(lambda key: curvature.value_and_grad(params, x, key=key)[2].sums['kernel']['G'][0])
  mean = jnp.mean(jax.vmap(draw)(jax.random.split(KEY, 4000)), 0)
  # dy_i[o] from the copy's gradient: J[.., i, in, o] = dy_i[o] x_i[in].
  dy = jnp.einsum('jziao,ia->jzio', jacobian, x) / (x**2).sum(-1)[:, None]
  close(mean, jnp.einsum('jzio,jzip->op', dy, dy), 0.03)


def test_custom_likelihood_equals_the_built_in_one():
  class Poisson:
    """Counts with log-rate outputs: F = exp(z)."""

    event_ndims = 1

    def draw(self, key, z):
      return jnp.exp(z) - jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)

    def columns(self, z):
      return z.shape[-1]

    def column(self, z, k):
      return jnp.exp(z / 2) * jax.nn.one_hot(k, z.shape[-1])

  params = {'kernel': jax.random.normal(KEY, (4, 3)) * 0.1, 'bias': jnp.zeros(3)}
  x = jax.random.normal(jax.random.key(1), (1, 4))
  network = lambda p, x: x @ p['kernel'] + p['bias']  # noqa: E731
  loss = functools.partial(loss_fn, observe=lambda z: kron.observe.custom(z, Poisson()), network=network)
  stats = jax.jit(kron.curvature(loss, params, x, fisher='exact').value_and_grad)(params, x)[2]
  own = jnp.concatenate([params['kernel'], params['bias'][None]])
  expected = exact_fisher(
    lambda own, x: network({'kernel': own[:-1], 'bias': own[-1]}, x), own, x, lambda z: jnp.diag(jnp.exp(z / 2))
  )
  close(block_of(stats, 'kernel'), expected, 1e-5)


def test_the_diagonal_fallback_is_an_unbiased_diagonal():
  """A parameter that enters through exp() has no site; its squared sampled gradients average to the diagonal."""
  x = jax.random.normal(KEY, (6, 3))
  params = {'rate': jax.random.normal(jax.random.key(1), (3,))}

  def network(params, x):
    return jnp.sin(x * jnp.exp(params['rate']))

  def loss(params, x):
    return 0.5 * (kron.observe.gaussian(network(params, x)) ** 2).sum(-1).mean()

  expected = exact_fisher(network, params, x, lambda z: jnp.eye(z.size))
  for fisher in ('sampled', 'exact'):
    curvature = kron.curvature(loss, params, x, fisher=fisher, fallback={'rate': 'diagonal'})

    def draw(key, curvature=curvature):
      stats = curvature.value_and_grad(params, x, key=key)[2]
      return stats.sums['rate']['F'][:, 0, 0] / stats.examples

    mean = jax.jit(lambda keys, draw=draw: jax.vmap(draw)(keys).mean(0))(jax.random.split(KEY, 4000))
    close(mean, np.diag(expected), 0.06)
