"""The damped inverse agrees with a dense solve, and fails by NaN and not by nonsense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh.kron.state.inverse import damped_inverse
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
def test_it_equals_the_dense_inverse(condition):
  m, damping, expected = stack(condition)
  close(jax.jit(damped_inverse)(m, damping), expected, 2e-3)


def test_in_f64(x64):
  m, damping, expected = stack(1e3, dtype=jnp.float64)
  close(damped_inverse(m, damping), expected, 1e-10)


def test_what_is_not_positive_definite_fails_alone():
  m, damping, expected = stack(10.0)
  m = m.at[0, 1].set(-jnp.eye(24))
  inverse = damped_inverse(m, damping)
  assert not np.isfinite(inverse[0, 1]).any() and np.isfinite(inverse[1]).all()
  close(inverse[0, 0], expected[0, 0], 1e-3)


@pytest.mark.parametrize('n', [7, 8, 13, 24, 31])
def test_large_matrices_by_halves(x64, monkeypatch, n):
  """Of any size; symmetric; one that is not positive definite, in whichever half, fails whole and alone."""
  monkeypatch.setattr('kronmesh.kron.state.inverse._LARGE', 6)
  m, damping, expected = stack(1e3, n, dtype=jnp.float64)
  damped = jax.jit(lambda m: damped_inverse(m, damping))
  inverse = damped(m)
  close(inverse, expected, 1e-10)
  close(inverse, jnp.swapaxes(inverse, -1, -2), 1e-12)
  for place in (0, n // 2, n - 1):
    bad = damped(m.at[0, 1, place, place].set(-1.0))
    assert np.isnan(bad[0, 1]).all()
    close(bad[1], expected[1], 1e-10)


@pytest.mark.long
@pytest.mark.parametrize('condition', [1e2, 1e4])
def test_by_halves_float32_loses_no_more_than_its_rounding_times_the_condition(monkeypatch, condition):
  """Some ten times what whole ones lose at 1e4, and positive definite."""
  m, damping, expected = stack(condition, 96)
  monkeypatch.setattr('kronmesh.kron.state.inverse._LARGE', 12)
  inverse = np.asarray(damped_inverse(m, damping), np.float64)
  assert np.linalg.norm(inverse - expected) / np.linalg.norm(expected) < condition * np.finfo(np.float32).eps
  assert np.linalg.eigvalsh((inverse + np.swapaxes(inverse, -1, -2)) / 2).min() > 0.4
