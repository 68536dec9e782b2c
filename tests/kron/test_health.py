"""Conditioning of the factors against dense eigenvalues, and inverses that fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron, parallel
from kronmesh.kron.state.inverse import sure_inverse
from tests.draws import normal

SIZES = (5, 7, 7, 3)


def problem(placement=None):
  params = {f'w{i}': normal(a, b, seed=i) / 2 for i, (a, b) in enumerate(itertools.pairwise(SIZES))}

  def loss(params, x, y):
    for w in params.values():
      x = jnp.tanh(x @ w)
    return 0.5 * ((kron.observe.gaussian(x) - y) ** 2).sum(-1).mean()

  batch = normal(16, 5, seed=8), normal(16, 3, seed=9)
  return kron.curvature(loss, params, *batch, fisher='empirical', placement=placement), params, batch


def refreshed(placement=None, damping=1e-2):
  curvature, params, batch = problem(placement)
  tx = kron.kfac(0.1, curvature, damping=damping, placement=placement)
  state = tx.init(params)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, *batch)
  return curvature, jax.jit(lambda s: tx.update(grads, s, params, stats=stats)[1])(state)


@pytest.mark.long
@pytest.mark.parametrize('inverses', [None, 'everywhere', 'owners'])
def test_conditions_are_those_of_dense_matrices(inverses):
  """On one device and by every placement; the factors are small enough that 30 steps suffice."""
  placement = None if inverses is None else parallel.Placement(parallel.make_mesh('data=8'), inverses)
  _, state = refreshed(placement)
  found = jax.jit(lambda s: kron.health(s, 1e-2, placement))(state)
  factors = kron.factors(state)
  for block, own in factors.items():
    traces = {name: float(np.trace(m[0])) / m.shape[-1] for name, m in own.items()}
    ratio = np.sqrt(traces['A'] / traces['G'])
    for name, m in own.items():
      added = np.sqrt(1e-2) * (ratio if name == 'A' else 1 / ratio)
      values = np.linalg.eigvalsh(np.asarray(m[0], np.float64))
      h = found[block][name]
      np.testing.assert_allclose(h.damping, [added], rtol=1e-4)
      np.testing.assert_allclose(h.largest, values[-1:], rtol=2e-2)
      np.testing.assert_allclose(h.condition, (values[-1:] + added) / (max(values[0], 0) + added), rtol=3e-2)


def test_a_state_without_factors():
  _, params, _ = problem()
  with pytest.raises(kron.CurvatureError, match='holds 0 of ScaleByKfacState'):
    kron.health(optax.sgd(0.1).init(params), 0.1)


def test_a_matrix_that_is_not_positive_definite_gets_as_much_damping_as_it_needs():
  """Its smallest eigenvalue is -0.05: 0.001 and 0.01 fail, 0.1 does not. The others are inverted as they are."""
  basis = np.linalg.qr(np.asarray(normal(4, 4)))[0]
  bad = jnp.asarray(basis * [1, 2, 3, -0.05] @ basis.T)[None, None]
  good = jnp.asarray(basis * [1, 2, 3, 4.0] @ basis.T)[None, None]
  hopeless = jnp.full_like(good, jnp.nan)
  x = jnp.concatenate([good, bad, hopeless, bad], 1)
  wanted = jnp.array([[True, True, True, False]])
  old = jnp.full_like(x, 7)
  new, failed, more = jax.jit(lambda x: sure_inverse(x, jnp.full((1, 4), 1e-3), wanted, old))(x)
  eye = np.eye(4)
  np.testing.assert_allclose(new[0, 0], np.linalg.inv(good[0, 0] + 1e-3 * eye), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(new[0, 1], np.linalg.inv(bad[0, 0] + 0.1 * eye), rtol=1e-3, atol=1e-3)
  assert (new[0, 2:] == 7).all()
  assert failed.tolist() == [[False, False, True, False]] and more.tolist() == [[False, True, False, False]]


@pytest.mark.long('False')
@pytest.mark.parametrize('between', [False, True])
def test_inverses_with_more_damping_are_counted(between):
  curvature, params, batch = problem()
  tx = kron.kfac(0.1, curvature, damping=1e-6)
  keep = kron.inverse_schedule(curvature, damping=1e-6, inverses_every=1)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, *batch)
  g = stats.sums['w1']['G']
  stats.sums['w1']['G'] = g.at[0, 0, 0].add(-1.02 * g[0, 0, 0])
  if between:
    state = keep.refresh(jax.jit(keep.take)(tx.init(params), stats), 0)
  else:
    state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)[1]
  kfac = kron.find_state(state)
  assert int(kfac.redamped_inverses) == 1 and int(kfac.rejected_inverses) == 0
