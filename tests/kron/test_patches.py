"""Gram matrices of patches from distances equal those of the patches themselves."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh import kron
from kronmesh.kron.operators.conv import Conv
from kronmesh.kron.operators.patches import gram_of_patches, near
from tests.draws import normal
from tests.kron.reference import close


def patches(x, window, padding):
  """One row for each output position, in plain numpy."""
  x = np.pad(np.asarray(x), [(0, 0), *padding, (0, 0)])
  places = [range(n - w + 1) for n, w in zip(x.shape[1:-1], window, strict=True)]
  cut = lambda b, p: x[(b, *(slice(i, i + w) for i, w in zip(p, window, strict=True)))].reshape(-1)  # noqa: E731
  return np.stack([cut(b, p) for b in range(len(x)) for p in itertools.product(*places)])


@st.composite
def convolutions(draw):
  window = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
  padding = [tuple(draw(st.integers(max(w - 2, 0), w - 1)) for _ in range(2)) for w in window]
  sizes = [draw(st.integers(max(1, w - sum(p)), 5)) for w, p in zip(window, padding, strict=True)]
  return window, padding, (draw(st.integers(1, 2)), *sizes, draw(st.integers(1, 3)))


@settings(max_examples=12, deadline=None)
@given(convolutions())
def test_distances_equal_patches(case):
  window, padding, shape = case
  with jax.enable_x64():
    x = normal(*shape, dtype=jnp.float64)
    assert near(window, padding)
    rows = patches(x, window, padding)
    found = jax.jit(lambda x: gram_of_patches(x, window, padding, jnp.float64))(x)
    close(found, rows.T @ rows, 1e-12)


def test_what_is_not_near():
  assert not near((5,), [(2, 2)]) and not near((3,), [(0, 0)]) and not near((3, 3), [(1, 1), (1, 3)])
  assert not near((1, 3), [(-1, -1), (1, 1)])  # which cuts off what is outside
  assert near((3,), [(1, 1)]) and near((1, 2), [(0, 0), (0, 1)])


def test_half_precision_is_summed_in_float32():
  x = normal(2, 6, 6, 8).astype(jnp.bfloat16)
  found = gram_of_patches(x, (3, 3), [(1, 1)] * 2, jnp.float32)
  rows = patches(x.astype(jnp.float32), (3, 3), [(1, 1)] * 2)
  assert found.dtype == jnp.float32
  close(found, rows.T @ rows, 1e-6)


def test_few_places_and_thin_inputs_are_left_to_rows():
  spec, ones, padding = (0, 3, 1, 2), (1, 1), ((1, 1), (1, 1))
  axes = (3,), (0, 1, 2), (4,)
  conv = Conv((3, 3, 8, 1, 4), axes, 1, 72, 4, (3,), (3, 3), ones, padding, ones, ones, spec, spec)
  assert conv.by_distance(normal(16, 8, 8, 8)) and not conv.by_distance(normal(15, 8, 8, 8))
  assert not conv.by_distance(normal(16, 8, 8, 7)) and not conv._replace(strides=(1, 2)).by_distance(
    normal(64, 8, 8, 8)
  )


def loss_fn(params, x, labels):
  y = jax.lax.conv_general_dilated(
    x, 0.5 * params['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  y = jnp.tanh(y + params['bias']).mean((1, 2))
  z = kron.observe.categorical(y, labels)
  return -jax.nn.log_softmax(z)[jnp.arange(len(z)), labels].mean()


@pytest.mark.long
@pytest.mark.parametrize('options', [{}, {'subsample': 0.5}], ids=str)
def test_statistics_of_a_layer_are_those_of_its_rows(x64, options):
  """With a bias and a scale, and of parts of the batch."""
  params = {'kernel': normal(3, 3, 8, 4, dtype=jnp.float64), 'bias': normal(4, dtype=jnp.float64)}
  batch = normal(16, 20, 18, 8, dtype=jnp.float64), jnp.arange(16) % 4
  curvature = kron.curvature(loss_fn, params, *batch, fisher='empirical', **options)
  with mock.patch.object(Conv, 'input_gram', autospec=True, side_effect=Conv.input_gram) as used:
    found = jax.jit(curvature.value_and_grad)(params, *batch)[2]
    assert used.called
  with mock.patch.object(Conv, 'by_distance', lambda *_: False):
    expected = jax.jit(lambda *args: curvature.value_and_grad(*args))(params, *batch)[2]
  jax.tree.map(lambda a, b: close(a, b, 1e-12), found, expected)
