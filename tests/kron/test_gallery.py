"""Real architectures: factors of every site, gradients, and one update; what refuses does so by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from tests.kron.gallery import GALLERY
from tests.kron.reference import close
from tests.kron.unrolled import check

KEY = jax.random.key(0)
REFUSED = {'hypernetwork': "'code' is used by .* \\(a computed weight\\)"}
# Seconds each: `make test` has these, `make test-all` all.
BRIEF = ('MLP', 'SIREN as a PINN')
NAMES = [n for n in GALLERY if n not in REFUSED]
CASES = [pytest.param(n, marks=[] if n in BRIEF else [pytest.mark.long]) for n in NAMES]


@pytest.mark.brief('MLP')
@pytest.mark.parametrize('name', CASES)
def test_factors_and_gradients(name):
  case = GALLERY[name]()
  curvature = kron.curvature(case.loss, case.params, *case.args, fisher='empirical')
  assert set(curvature.gradient_only.values()) <= {'it has no gradient'}, str(curvature)
  assert check(curvature, case.loss, case.params, case.args, case.examples, case.state) == len(curvature.blocks)
  value, grads, _ = jax.jit(curvature.value_and_grad)(case.params, *case.args)
  expected_value, expected = jax.jit(jax.value_and_grad(case.loss))(case.params, *case.args)
  close(value, expected_value, 1e-6)
  norm = optax.global_norm(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(norm)), grads, expected)


@pytest.mark.long
@pytest.mark.parametrize('name', CASES)
def test_one_update_lowers_the_loss(name):
  """With the sampled Fisher, as one trains."""
  case = GALLERY[name]()
  curvature = kron.curvature(case.loss, case.params, *case.args)
  tx = kron.kfac(0.1, curvature, damping=0.1, momentum=0.0, kl_clip=1e-3)

  @jax.jit
  def step(params, state, key):
    loss, grads, stats = curvature.value_and_grad(params, *case.args, key=key)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  params, state, before = step(case.params, tx.init(case.params), KEY)
  assert int(kron.find_state(state).averages.rejected_statistics) == int(kron.find_state(state).rejected_inverses) == 0
  assert case.loss(params, *case.args) < before
  assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(params))


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_refused_names_the_parameter(name):
  case = GALLERY[name]()
  with pytest.raises(kron.CurvatureError, match=REFUSED[name]):
    kron.curvature(case.loss, case.params, *case.args)


def test_at_most_three_of_at_least_thirty_refuse():
  assert len(REFUSED) <= 3 and len(GALLERY) >= 30
