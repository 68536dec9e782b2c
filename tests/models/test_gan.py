"""Generators, discriminators, and augmentation through which gradients flow."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import models
from kronmesh.models.gan import SIZES, SpectralNorm
from tests.draws import integers, normal


def test_a_kernel_is_divided_by_its_largest_singular_value():
  """After some steps of power iteration; a bias stays."""
  layer = SpectralNorm(nn.Conv(5, (3, 3)))
  x = normal(2, 6, 6, 4)
  variables = layer.init(jax.random.key(0), x, True)
  kernel = normal(3, 3, 4, 5, seed=2)
  params = {'layer': {'kernel': kernel, 'bias': normal(5, seed=3)}}
  state = {'spectral': variables['spectral']}
  power = jax.jit(lambda state: layer.apply({'params': params, **state}, x, True, mutable=['spectral'])[1])
  for _ in range(100):
    state = power(state)
  largest = np.linalg.svd(np.asarray(kernel).reshape(-1, 5), compute_uv=False)[0]
  plain = nn.Conv(5, (3, 3)).apply({'params': {'kernel': kernel / largest, 'bias': params['layer']['bias']}}, x)
  np.testing.assert_allclose(layer.apply({'params': params, **state}, x, False), plain, rtol=1e-4, atol=1e-5)


def test_gradients_through_the_value_are_those_of_the_formula():
  """d(W / sigma) = (dW - W_bar <u v', dW>) / sigma, Miyato et al. 2018, eq. 10."""
  layer = SpectralNorm(nn.Dense(3, use_bias=False))
  x, kernel = jnp.eye(4), normal(4, 3)
  state = {'spectral': layer.init(jax.random.key(0), x, True)['spectral']}
  params = {'layer': {'kernel': kernel}}
  power = jax.jit(lambda state: layer.apply({'params': params, **state}, x, True, mutable=['spectral'])[1])
  for _ in range(200):
    state = power(state)
  u, s, v = np.linalg.svd(np.asarray(kernel), full_matrices=False)
  toward = normal(4, 3, seed=5)
  slope = jax.jvp(lambda k: layer.apply({'params': {'layer': {'kernel': k}}, **state}, x, False), (kernel,), (toward,))[
    1
  ]
  expected = (toward - kernel / s[0] * (u[:, 0] @ np.asarray(toward) @ v[0])) / s[0]
  np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize('size', [28, 32, *(pytest.param(n, marks=pytest.mark.long) for n in (64, 128))])
def test_sizes(size):
  latent = 4 * (len(SIZES[size][1]) + 1)
  generator = models.Generator(size, 3, 5, 2, latent, 8)
  label = integers(5, 2)
  made = jax.eval_shape(lambda: generator.init_with_output(jax.random.key(0), normal(2, latent), label, True)[0])
  assert made.shape == (2, size, size, 3)
  discriminator = models.Discriminator(size, 5, 2)
  score = jax.eval_shape(lambda: discriminator.init_with_output(jax.random.key(0), normal(*made.shape), label, True)[0])
  assert score.shape == (2,)


def test_unknown_settings_are_named():
  with pytest.raises(ValueError, match='size=30 is unknown; choose from 28, 32, 64, 128'):
    models.Generator(30, 1, 5, 2).init(jax.random.key(0), normal(2, 64), integers(5, 2))
  with pytest.raises(ValueError, match='latent=64 does not divide by the 3 parts'):
    models.Generator(28, 1, 5, 2).init(jax.random.key(0), normal(2, 64), integers(5, 2))
  with pytest.raises(ValueError, match="augmentation 'mirror' is unknown; choose from colour, translation, cutout"):
    models.augment(normal(2, 8, 8, 1), jax.random.key(0), ('mirror',))


def test_brightness_moves_by_a_quarter_at_most():
  moved = models.augment(jnp.full((500, 4, 4, 1), 0.5), jax.random.key(0), ('colour',))
  assert 0.24 < np.abs(moved - 0.5).max() <= 0.25


@pytest.mark.long('1-colour', '1-translation', '1-cutout', '3-colour', '3-translation')
@pytest.mark.parametrize('name', models.POLICIES)
@pytest.mark.parametrize('channels', [1, 3])
def test_augmentation_is_of_each_image_and_differentiable(name, channels):
  x, key = jax.random.uniform(jax.random.key(1), (6, 16, 16, channels)), jax.random.key(2)
  run = lambda x: models.augment(x, key, (name,))  # noqa: E731
  found = run(x)
  assert found.shape == x.shape and not np.allclose(found, x)
  changed = run(x.at[0].add(0.1))
  np.testing.assert_allclose(changed[1:], found[1:])
  toward = normal(*x.shape)
  slope = jax.jvp(run, (x,), (toward,))[1]
  np.testing.assert_allclose(slope, (run(x + 1e-2 * toward) - run(x - 1e-2 * toward)) / 2e-2, atol=1e-3)


@pytest.mark.long
def test_what_a_translation_and_a_cutout_do():
  x = jnp.arange(1, 257.0).reshape(1, 16, 16, 1).repeat(20, 0)
  moved = np.asarray(models.augment(x, jax.random.key(0), ('translation',)))[..., 0]
  for image in moved:
    there = [
      (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if _shifted(np.asarray(x[0, ..., 0]), dy, dx, image)
    ]
    assert len(there) == 1
  assert len({m.tobytes() for m in moved}) > 5
  cut = np.asarray(models.augment(x, jax.random.key(0), ('cutout',)))[..., 0]
  for image in cut:
    rows, columns = (np.flatnonzero((image == 0).any(axis)) for axis in (1, 0))
    assert 1 <= len(rows) <= 9 and 1 <= len(columns) <= 9 and (image == 0).sum() == len(rows) * len(columns)


def _shifted(whole, dy, dx, image):
  padded = np.pad(whole, 2)
  return (padded[2 + dy : 18 + dy, 2 + dx : 18 + dx] == image).all()
