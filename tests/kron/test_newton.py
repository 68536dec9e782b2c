"""Products equal dense curvature, and the rules of the slide equal its dense solve: in float64, to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from kronmesh import kron
from tests.kron.reference import close, exact_fisher

N, D, K = 12, 4, 3
pytestmark = pytest.mark.usefixtures('x64')


class Laplaceless:
  """A likelihood of the user's own, without `product`: independent normals of standard deviation 1/2."""

  event_ndims = 1

  def draw(self, key, outputs):
    return 2 * jax.random.normal(key, outputs.shape, outputs.dtype)

  def columns(self, outputs):
    return outputs.shape[-1]

  def column(self, outputs, k):
    return jnp.broadcast_to(2 * jax.nn.one_hot(k, outputs.shape[-1], dtype=outputs.dtype), outputs.shape)


def cross_entropy(z, y):
  return optax.softmax_cross_entropy_with_integer_labels(z, y)


def softplus_loss(z, y):
  return jnp.sum(jnp.logaddexp(z, -z) + jnp.cos(y) * z)


LIKELIHOODS = {
  'categorical': (kron.observe.categorical, lambda z: _softmax_root(z)),
  'gaussian': (kron.observe.gaussian, lambda z: jnp.eye(K)),
  'gaussian of variance 1/2': (functools.partial(kron.observe.gaussian, variance=0.5), lambda z: 2**0.5 * jnp.eye(K)),
  'bernoulli': (
    kron.observe.bernoulli,
    lambda z: jnp.diag(jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))),
  ),
  'own': (lambda z: kron.observe.custom(z, Laplaceless()), lambda z: 2 * jnp.eye(K)),
  'loss': (
    lambda z: kron.observe.loss(z, softplus_loss, jnp.arange(N)),
    lambda z: jnp.diag(jnp.sqrt(4 * jax.nn.sigmoid(2 * z) * jax.nn.sigmoid(-2 * z))),
  ),
}


def _softmax_root(z):
  p = jax.nn.softmax(z)
  return jnp.sqrt(p)[:, None] * (p - jnp.eye(K))


def network(params, x):
  h = jnp.tanh(x @ params['in'] + params['shift'])
  return jax.checkpoint(lambda h: h @ params['out'])(h) * params['scale']


def make(observe=kron.observe.categorical, fisher='exact', loss_of=cross_entropy):
  keys = jax.random.split(jax.random.key(3), 6)
  params = {
    'in': jax.random.normal(keys[0], (D, 5)),
    'shift': jax.random.normal(keys[1], (5,)),
    'out': jax.random.normal(keys[2], (5, K)),
    'scale': jax.random.normal(keys[3], (K,)),
  }
  x, y = jax.random.normal(keys[4], (N, D)), jax.random.randint(keys[5], (N,), 0, K)

  def loss(params, x, y):
    return loss_of(observe(network(params, x)), y).mean()

  return loss, params, (x, y), kron.curvature(loss, params, x, y, fisher=fisher)


def matrix_of(product, params):
  """The dense matrix that a product with trees stands for."""
  flat, unravel = ravel_pytree(params)
  return jax.jit(jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0]))(jnp.eye(flat.size))


def dense_hessian(loss, params, args):
  flat, unravel = ravel_pytree(params)
  return np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), *args)))(flat))


def dense_gauss_newton(params, args, loss_of=cross_entropy):
  flat, unravel = ravel_pytree(params)
  x, y = args
  forward = lambda v: network(unravel(v), x).reshape(-1)  # noqa: E731
  hessian = jax.jit(jax.hessian(lambda z: loss_of(z.reshape(N, K), y).mean()))(forward(flat))
  jacobian = jax.jit(jax.jacobian(forward))(flat)
  return np.asarray(jacobian.T @ hessian @ jacobian)


def dense_empirical(params, args):
  flat, unravel = ravel_pytree(params)
  one = lambda v, x, y: cross_entropy(network(unravel(v), x[None])[0], y)  # noqa: E731
  rows = jax.vmap(jax.grad(one), (None, 0, 0))(flat, *args)
  return np.asarray(rows.T @ rows / N)


def test_hessian():
  loss, params, args, curvature = make()
  close(matrix_of(curvature.products(params, *args).hessian, params), dense_hessian(loss, params, args), 1e-12)


def test_gauss_newton():
  _, params, args, curvature = make()
  close(matrix_of(curvature.products(params, *args).gauss_newton, params), dense_gauss_newton(params, args), 1e-12)


def test_gauss_newton_is_of_the_loss_and_not_of_the_likelihood():
  smoothed = lambda z, y: jnp.sum(jnp.cosh(z), -1) * (1 + y)  # noqa: E731
  _, params, args, curvature = make(loss_of=smoothed)
  product = curvature.products(params, *args).gauss_newton
  close(matrix_of(product, params), dense_gauss_newton(params, args, smoothed), 1e-12)


@pytest.mark.long('loss')
@pytest.mark.parametrize('name', LIKELIHOODS)
def test_fisher(name):
  observe, root = LIKELIHOODS[name]
  _, params, args, curvature = make(observe)
  expected = exact_fisher(network, params, args[0], root)
  products = curvature.products(params, *args)
  close(matrix_of(products.fisher, params), expected, 1e-12)
  vectors = [jax.tree.map(lambda p, k=k: jnp.cos(k + p), params) for k in range(3)]
  flat = np.stack([ravel_pytree(v)[0] for v in vectors])
  close(products.forms(vectors), flat @ expected @ flat.T, 1e-12)


def test_empirical_fisher():
  _, params, args, curvature = make(fisher='empirical')
  close(matrix_of(curvature.products(params, *args).fisher, params), dense_empirical(params, args), 1e-12)


def test_sampled_fisher_has_rank_one_for_each_example_and_the_right_mean():
  _, params, args, curvature = make(fisher='sampled')
  dense = jax.jit(lambda key: matrix_of(curvature.products(params, *args, key=key).fisher, params))
  sampled = np.stack([dense(jax.random.key(i)) for i in range(400)])
  assert np.linalg.matrix_rank(sampled[0], tol=1e-10) <= N
  expected = exact_fisher(network, params, args[0], _softmax_root)
  error = np.linalg.norm(sampled.mean(0) - expected)
  scatter = np.linalg.norm(sampled.std(0)) / 20
  assert error < 2 * scatter and scatter < 0.2 * np.linalg.norm(expected)


def test_a_mask_counts_only_what_it_keeps():
  _, params, (x, y), _ = make()
  kept = jnp.arange(N) < 7

  def masked(params, x, y):
    z = kron.observe.categorical(network(params, x), y, mask=kept)
    return (cross_entropy(z, y) * kept).sum() / kept.sum()

  curvature = kron.curvature(masked, params, x, y, fisher='exact')
  expected = exact_fisher(network, params, x[:7], _softmax_root)
  close(matrix_of(curvature.products(params, x, y).fisher, params), expected, 1e-12)


@pytest.mark.long
def test_products_through_a_scan_and_a_derivative_rule_of_its_own():
  @jax.custom_vjp
  def clipped(x):
    return x * 2

  clipped.defvjp(lambda x: (x * 2, None), lambda _, dy: (dy * 2,))
  _, params, args, _ = make()

  def other(params, x, y):
    def body(total, xy):
      z = kron.observe.categorical(clipped(network(params, xy[0]) / 2))
      return total + cross_entropy(z, xy[1]).sum(), None

    return jax.lax.scan(body, 0.0, (x.reshape(3, 4, D), y.reshape(3, 4)))[0] / N

  curvature = kron.curvature(other, params, *args, fisher='exact', examples=N)
  expected = exact_fisher(network, params, args[0], _softmax_root)
  close(matrix_of(jax.jit(curvature.products(params, *args).fisher), params), expected, 1e-12)
  with pytest.raises(kron.CurvatureError, match='outside of loops'):
    curvature.products(params, *args).gauss_newton(params)


def test_without_marks_there_is_the_hessian_only():
  loss, params, args, _ = make()
  plain = lambda params, x, y: cross_entropy(network(params, x), y).mean()  # noqa: E731
  products = kron.curvature(plain, params, *args, fisher='empirical', examples=N).products(params, *args)
  close(matrix_of(products.hessian, params), dense_hessian(loss, params, args), 1e-12)
  with pytest.raises(kron.CurvatureError, match='mark its outputs'):
    products.fisher(params)


RULES = {
  'newton': (kron.newton, lambda loss, params, args: dense_hessian(loss, params, args)),
  'gauss_newton': (kron.gauss_newton, lambda loss, params, args: dense_gauss_newton(params, args)),
  'natural_gradient': (
    kron.natural_gradient,
    lambda loss, params, args: exact_fisher(network, params, args[0], _softmax_root),
  ),
}


@pytest.mark.brief('natural_gradient-False', 'gauss_newton-True')
@pytest.mark.parametrize('preconditioned', [False, True])
@pytest.mark.parametrize('rule', RULES)
def test_a_rule_equals_its_dense_solve(rule, preconditioned):
  loss, params, args, curvature = make()
  transform, dense = RULES[rule]
  damping = 1.0 if rule == 'newton' else 1e-2  # the Hessian of this loss has eigenvalues below zero
  kfac = kron.scale_by_kfac(curvature, damping=damping) if preconditioned else None
  tx = transform(0.7, damping=damping, preconditioner=kfac, max_iterations=200, tolerance=1e-12)

  @jax.jit
  def step(params):
    _, grads, stats = curvature.value_and_grad(params, *args)
    products = curvature.products(params, *args)
    return grads, *tx.update(grads, tx.init(params), params, products=products, stats=stats)

  grads, updates, state = step(params)
  g = ravel_pytree(grads)[0]
  matrix = dense(loss, params, args) + damping * np.eye(g.size)
  assert np.linalg.eigvalsh(matrix).min() > 0
  close(ravel_pytree(updates)[0], -0.7 * np.linalg.solve(matrix, g), 1e-9)
  assert not state[0].negative and state[0].residual < 1e-12


@pytest.mark.long
def test_kfac_saves_iterations():
  def loss(params, x, y):
    z = kron.observe.categorical(jnp.tanh(x @ params['in']) @ params['out'], y)
    return cross_entropy(z, y).mean()

  counts = {'none': 0, 'kfac': 0}
  for seed in range(4):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {'in': jax.random.normal(keys[0], (8, 16)) / 3, 'out': jax.random.normal(keys[1], (16, 4)) / 4}
    x, y = 10 * jax.random.normal(keys[2], (512, 8)), jax.random.randint(keys[3], (512,), 0, 4)
    curvature = kron.curvature(loss, params, x, y, fisher='exact')
    _, grads, stats = curvature.value_and_grad(params, x, y)
    products = curvature.products(params, x, y)
    for name, kfac in {'none': None, 'kfac': kron.scale_by_kfac(curvature, damping=1e-4)}.items():
      tx = kron.natural_gradient(1.0, damping=1e-4, preconditioner=kfac, max_iterations=300, tolerance=1e-3)
      _, state = tx.update(grads, tx.init(params), params, products=products, stats=stats)
      counts[name] += int(state[0].iterations)
  assert counts['kfac'] < 0.6 * counts['none'], counts


def test_negative_curvature_ends_the_solution():
  loss = lambda params: params['x'] @ jnp.diag(jnp.array([2.0, -1.0])) @ params['x'] / 2  # noqa: E731
  params = {'x': jnp.array([1.0, 1.0])}
  found = kron.conjugate_gradients(
    lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1],
    jax.grad(loss)(params),
    x0=jax.tree.map(jnp.zeros_like, params),
  )
  assert found.negative and found.iterations == 2
  flat = kron.conjugate_gradients(
    lambda v: jax.tree.map(lambda x: -x, v), params, x0=jax.tree.map(jnp.zeros_like, params)
  )
  assert flat.negative and (flat.x['x'] == params['x']).all()  # the gradient itself


@pytest.mark.long
def test_a_warm_start_begins_at_the_last_solution():
  _, params, args, curvature = make()
  tx = kron.natural_gradient(1.0, damping=1e-2, max_iterations=100, tolerance=1e-8, warm_start=1.0)
  _, grads, _ = curvature.value_and_grad(params, *args, statistics=False)
  products = curvature.products(params, *args)
  _, first = tx.update(grads, tx.init(params), params, products=products)
  _, second = tx.update(grads, first, params, products=products)
  assert first[0].iterations > 5 and second[0].iterations == 0


@pytest.mark.wrong_types
def test_mistakes_end_in_one_line():
  _, params, args, curvature = make()
  grads = curvature.value_and_grad(params, *args, statistics=False)[1]
  tx = kron.newton(1.0)
  with pytest.raises(kron.CurvatureError, match='products='):
    jax.jit(tx.update)(grads, tx.init(params), params)
  with pytest.raises(kron.CurvatureError, match="matrix='jacobian'"):
    kron.scale_by_curvature('jacobian', damping=0.1)
