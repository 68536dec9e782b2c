"""A loss that sums over its observations, where K-FAC expects the mean, is told; a mean is not."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from kronmesh import kron
from tests.draws import integers, normal

X, LABEL, W = normal(64, 5), integers(3, 64), normal(5, 3)
TARGET = normal(64, 3)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def categorical(reduce):
  return lambda w, x, y: reduce(cross_entropy(kron.observe.categorical(x @ w, y), y))


def gaussian(reduce):
  return lambda w, x, t: reduce(jnp.sum((kron.observe.gaussian(x @ w, t) - t) ** 2, -1))


def masked(w, x, y):
  kept = x[:, 0] > 0
  losses = cross_entropy(kron.observe.categorical(x @ w, y, mask=kept), y)
  return jnp.sum(losses * kept) / jnp.sum(kept)


def two_terms(w, x, y):
  logits = x @ w
  first = cross_entropy(kron.observe.categorical(logits, y), y).mean()
  return first + 0.3 * jnp.mean((kron.observe.gaussian(logits[:8], jnp.zeros((8, 3)), weight=0.3)) ** 2) * 3 / 2


SUMS = {
  'a sum': (categorical(jnp.sum), LABEL, 64),
  'half a sum': (gaussian(lambda e: 0.5 * jnp.sum(e)), TARGET, 64),
  'a sum over positions': (lambda w, x, y: categorical(lambda e: jnp.mean(e.reshape(8, 8).sum(1)))(w, x, y), LABEL, 8),
  'a scaled mean': (categorical(lambda e: 1024 * jnp.mean(e)), LABEL, 1024),
}
MEANS = {
  'a mean': (categorical(jnp.mean), LABEL),
  'half a mean': (gaussian(lambda e: 0.5 * jnp.mean(e)), TARGET),
  'twice the mean': (gaussian(jnp.mean), TARGET),
  'a sum divided by its length': (categorical(lambda e: jnp.sum(e) / len(e)), LABEL),
  'a masked mean': (masked, LABEL),
  'a mean and weight decay': (lambda w, x, y: categorical(jnp.mean)(w, x, y) + 1e-3 * jnp.sum(w**2), LABEL),
  'two terms': (two_terms, LABEL),
}


@pytest.mark.parametrize('name', SUMS)
def test_a_sum_is_told_with_its_size(name):
  loss, target, times = SUMS[name]
  with pytest.warns(
    UserWarning, match=rf'about {times:.3g} times the mean over its 64 observations'.replace('+', r'\+')
  ):
    kron.curvature(loss, W, X, target)
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (W, X, target)]
  with pytest.warns(UserWarning, match='times the mean'):
    kron.curvature(loss, *shapes)


@pytest.mark.parametrize('name', MEANS)
def test_a_mean_is_not(name):
  loss, target = MEANS[name]
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    kron.curvature(loss, W, X, target)
