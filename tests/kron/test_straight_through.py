"""Weights that the loss rounds, with the gradient passed straight through: factors are those of the effective weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.reference import close

X = normal(9, 4)
SHAPES = {'w': (4, 5), 'b': (5,), 'o': (5, 2)}
PARAMS = normals(SHAPES)


def rounded(w):
  return jnp.round(w * 4) / 4


def ternary(w):
  """-s, 0 or s with a threshold of 0.7 times the mean."""
  there = jnp.abs(w) > 0.7 * jnp.abs(w).mean()
  s = (jnp.abs(w) * there).sum() / jnp.maximum(there.sum(), 1)
  return jnp.sign(w) * there * s


@jax.custom_vjp
def by_rule(w):
  return rounded(w)


by_rule.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


@jax.custom_jvp
def by_tangent(w):
  return rounded(w)


by_tangent.defjvp(lambda primals, tangents: (rounded(primals[0]), tangents[0]))


@jax.custom_vjp
def steps(w, size):
  return jnp.round(w / size) * size


steps.defvjp(lambda w, size: (jnp.round(w / size) * size, None), lambda _, g: (g, jnp.zeros(())))


@jax.custom_vjp
def whole(w):
  return jnp.round(w)


whole.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))

STOP = jax.lax.stop_gradient
QUANTIZERS = {
  'w + stop(q(w) - w)': (lambda w: w + STOP(rounded(w) - w), rounded),
  'stop(q(w)) + (w - stop(w))': (lambda w: STOP(rounded(w)) + (w - STOP(w)), rounded),
  'w - stop(w - q(w))': (lambda w: w - STOP(w - rounded(w)), rounded),
  'ternary': (lambda w: w + STOP(ternary(w) - w), ternary),
  'a rule of its own': (by_rule, rounded),
  'a rule of tangents': (by_tangent, rounded),
  'a rule in the middle': (lambda w: whole(w * 4) / 4, rounded),
  'with a step size': (lambda w: steps(w, 0.25), rounded),
  'in a jit': (jax.jit(lambda w: w + STOP(rounded(w) - w)), rounded),
  'in a remat': (jax.checkpoint(lambda w: w + STOP(rounded(w) - w)), rounded),
  'scaled and pruned': (lambda w: by_rule(w) * np.tile([1.0, 0.0], len(w.reshape(-1)) // 2).reshape(w.shape), None),
}


def loss_of(quantize):
  def loss(p, x):
    h = jnp.tanh(x @ quantize(p['w']) + p['b'])
    return 0.5 * (kron.observe.gaussian(h @ quantize(p['o'])) ** 2).sum(-1).mean()

  return loss


@pytest.mark.long(
  'w + stop(q(w) - w)-exact',
  'ternary-exact',
  'a rule in the middle-empirical',
  'a rule in the middle-exact',
  'a rule of its own-exact',
  'in a jit-exact',
  'in a remat-empirical',
  'in a remat-exact',
  'scaled and pruned-exact',
  'stop(q(w)) + (w - stop(w))-empirical',
  'stop(q(w)) + (w - stop(w))-exact',
  'w + stop(q(w) - w)-empirical',
  'w - stop(w - q(w))-empirical',
  'w - stop(w - q(w))-exact',
  'with a step size-empirical',
  'with a step size-exact',
)
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('name', QUANTIZERS)
def test_factors_are_those_of_the_effective_weight(name, fisher):
  """As if the rounded weights were the parameters; value and gradient are those of the loss itself."""
  quantize, plain = QUANTIZERS[name]
  loss = loss_of(quantize)
  value, grads, stats = jax.jit(kron.curvature(loss, PARAMS, X, fisher=fisher).value_and_grad)(PARAMS, X)
  expected, slopes = jax.jit(jax.value_and_grad(loss))(PARAMS, X)
  assert value == expected
  jax.tree.map(np.testing.assert_array_equal, grads, slopes)
  if plain is None:
    plain = quantize
  effective = {k: plain(v) if k in 'wo' else v for k, v in PARAMS.items()}
  right = jax.jit(kron.curvature(loss_of(lambda w: w), effective, X, fisher=fisher).value_and_grad)(effective, X)[2]
  for block in ('w', 'o'):
    jax.tree.map(lambda a, b: close(a, b, 1e-5), stats.means(block), right.means(block))


def test_a_function_of_weights_alone_written_plainly():
  """`operators=` stands for a rule that is not the identity, such as a clipped one."""

  @jax.custom_vjp
  def clipped(w):
    return rounded(w)

  clipped.defvjp(lambda w: (rounded(w), w), lambda w, g: (g * (jnp.abs(w) < 1),))
  loss = loss_of(clipped)
  with pytest.raises(kron.CurvatureError, match=r"'[wo]' is used by custom_vjp_call"):
    kron.curvature(loss, PARAMS, X, fisher='exact')
  effective = {k: rounded(v) if k in 'wo' else v for k, v in PARAMS.items()}
  right = jax.jit(kron.curvature(loss_of(lambda w: w), effective, X, fisher='exact').value_and_grad)(effective, X)[2]
  for plain, scale in ((lambda w: w, 1.0), (lambda w: 2 * w, 2.0)):
    curvature = kron.curvature(loss, PARAMS, X, fisher='exact', operators={'clipped': plain})
    _, grads, stats = jax.jit(curvature.value_and_grad)(PARAMS, X)
    jax.tree.map(np.testing.assert_array_equal, grads, jax.jit(jax.grad(loss))(PARAMS, X))
    close(stats.means('o')['G'], right.means('o')['G'], 1e-5)
    close(stats.means('o')['A'], scale**2 * right.means('o')['A'], 1e-5)


REFUSED = {
  'a reversed gradient': lambda w: _reversed(w),
  'a gradient scaled by data': lambda w: _scaled(w),
  'a curve': jnp.tanh,
}


@jax.custom_vjp
def _reversed(w):
  return w


_reversed.defvjp(lambda w: (w, None), lambda _, g: (-g,))


@jax.custom_vjp
def _scaled(w):
  return w


_scaled.defvjp(lambda w: (w, w), lambda w, g: (g * w,))


@pytest.mark.parametrize('name', REFUSED)
def test_another_gradient_is_refused(name):
  with pytest.raises(kron.CurvatureError, match=r"parameter '[wo]' is used by"):
    kron.curvature(loss_of(REFUSED[name]), PARAMS, X, fisher='exact')


def test_noise_on_a_weight_names_the_parameter():
  """Bayes by backprop: the spread of a weight has no block; its gradient stays plain where that is asked for."""
  noise = normal(4, 5, seed=4)
  params = {**PARAMS, 'rho': normal(4, 5, seed=5)}

  def loss(p, x):
    h = jnp.tanh(x @ (p['w'] + jax.nn.softplus(p['rho']) * noise) + p['b'])
    return 0.5 * (kron.observe.gaussian(h @ p['o']) ** 2).sum(-1).mean()

  with pytest.raises(kron.CurvatureError, match=r"parameter 'rho' is used by .*fallback=\{'rho': 'diagonal'\}"):
    kron.curvature(loss, params, X, fisher='exact')
  stats = jax.jit(kron.curvature(loss, params, X, fisher='exact', fallback={'rho': 'gradient'}).value_and_grad)(
    params, X
  )[2]
  close(stats.means('w')['A'][0][:4, :4], X.T @ X / 9, 1e-5)
