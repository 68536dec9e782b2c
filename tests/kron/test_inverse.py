"""Every way to invert agrees with a dense solve, warm or cold, and fails by NaN and not by nonsense."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from kronmesh.kron.inverse import INVERSES, damped_inverse
from tests.kron.reference import close


def stack(condition, n=24, dtype=jnp.float32):
  """(2, 3, n, n) symmetric matrices with eigenvalues from 1 / condition to 1, and their damped inverses in float64."""
  rng = np.random.default_rng(0)
  q = np.linalg.qr(rng.normal(size=(2, 3, n, n)))[0]
  values = np.logspace(-np.log10(condition), 0, n)
  m = (q * values) @ np.swapaxes(q, -1, -2)
  damping = np.full((2, 3), 1 / condition)
  return jnp.asarray(m, dtype), jnp.asarray(damping, dtype), np.linalg.inv(m + damping[..., None, None] * np.eye(n))


@pytest.mark.parametrize('condition', [3.0, 1e3])
@pytest.mark.parametrize('method', INVERSES)
def test_a_method_equals_the_dense_inverse(method, condition):
  m, damping, expected = stack(condition)
  close(jax.jit(damped_inverse, static_argnums=2)(m, damping, method), expected, 2e-3)


@pytest.mark.parametrize('method', INVERSES)
def test_in_f64(x64, method):
  m, damping, expected = stack(1e3, dtype=jnp.float64)
  close(damped_inverse(m, damping, method), expected, 2e-4 if method == 'newton_schulz' else 1e-10)


def test_newton_schulz_starts_from_an_old_inverse_and_survives_a_bad_one():
  m, damping, expected = stack(100.0)
  near = jnp.asarray(expected, jnp.float32) * 1.02
  far = jnp.full_like(m, 1e3)
  for old in (near, far, jnp.full_like(m, jnp.nan)):
    close(damped_inverse(m, damping, 'newton_schulz', old), expected, 1e-3)


@pytest.mark.parametrize('method', ['cholesky', 'newton_schulz'])
def test_what_is_not_positive_definite_fails_alone(method):
  m, damping, expected = stack(10.0)
  m = m.at[0, 1].set(-jnp.eye(24))
  inverse = damped_inverse(m, damping, method)
  assert not np.isfinite(inverse[0, 1]).any() and np.isfinite(inverse[1]).all()
  close(inverse[0, 0], expected[0, 0], 1e-3)


@pytest.mark.parametrize('n', [7, 8, 13, 24, 31])
def test_large_matrices_by_halves(x64, monkeypatch, n):
  """Of any size; symmetric; one that is not positive definite, in whichever half, fails whole and alone."""
  monkeypatch.setattr('kronmesh.kron.inverse._LARGE', 6)
  m, damping, expected = stack(1e3, n, dtype=jnp.float64)
  damped = jax.jit(lambda m: damped_inverse(m, damping))
  inverse = damped(m)
  close(inverse, expected, 1e-10)
  close(inverse, jnp.swapaxes(inverse, -1, -2), 1e-12)
  for place in (0, n // 2, n - 1):
    bad = damped(m.at[0, 1, place, place].set(-1.0))
    assert np.isnan(bad[0, 1]).all()
    close(bad[1], expected[1], 1e-10)


@pytest.mark.parametrize('condition', [1e2, 1e4])
def test_by_halves_float32_loses_no_more_than_its_rounding_times_the_condition(monkeypatch, condition):
  """Some ten times what whole ones lose at 1e4, and positive definite."""
  m, damping, expected = stack(condition, 96)
  monkeypatch.setattr('kronmesh.kron.inverse._LARGE', 12)
  inverse = np.asarray(damped_inverse(m, damping), np.float64)
  assert np.linalg.norm(inverse - expected) / np.linalg.norm(expected) < condition * np.finfo(np.float32).eps
  assert np.linalg.eigvalsh((inverse + np.swapaxes(inverse, -1, -2)) / 2).min() > 0.4


@pytest.mark.parametrize('method', INVERSES)
def test_kfac_trains_alike_by_every_method(method):
  def loss_fn(params, x, y):
    z = kron.observe.categorical(jnp.tanh(x @ params['a']) @ params['b'], y)
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

  keys = jax.random.split(jax.random.key(0), 3)
  params = {'a': jax.random.normal(keys[0], (6, 9)), 'b': jax.random.normal(keys[1], (9, 4))}
  x, y = jax.random.normal(keys[2], (64, 6)), jnp.arange(64) % 4
  curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')

  def run(method):
    tx = kron.kfac(0.3, curvature, damping=0.03, inverse=method)

    @jax.jit
    def step(params, state):
      value, grads, stats = curvature.value_and_grad(params, x, y)
      updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
      return optax.apply_updates(params, updates), state, value

    now, state = params, tx.init(params)
    for _ in range(8):
      now, state, value = step(now, state)
    assert kron.find_state(state).rejected_inverses == 0
    return value

  close(run(method), run('cholesky'), 1e-3)


def test_an_unknown_method_is_named():
  with pytest.raises(kron.CurvatureError, match='newton_schulz'):
    kron.scale_by_kfac(None, inverse='lu')
