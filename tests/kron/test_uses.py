"""Marks that say which results are uses of a kernel, and that every example has a copy of a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal


def network(p, x, where):
  hidden = jnp.tanh(kron.used(x, where) @ p['w'] + p['b'])
  return jnp.where(where, hidden @ p['out'], 0).sum(1)


@pytest.mark.parametrize('shards', [1, 2])
def test_padding_is_left_out_of_factors(shards):
  """As many places as there are, whatever stands in the padding."""
  params = {'w': normal(3, 4), 'b': normal(4), 'out': normal(4, 2)}
  x, lengths = normal(4, 5, 3), jnp.array([5, 2, 3, 1])
  where = (jnp.arange(5) < lengths[:, None])[..., None]

  def loss(p, x):
    z = kron.observe.gaussian(network(p, x, where))
    return (z**2).mean()

  results = []
  for filled in (0.0, 7.0):
    padded = jnp.where(where, x, filled)
    c = kron.curvature(loss, params, padded, fisher='empirical', shards=shards, fallback={'out': 'gradient'})
    results.append(jax.jit(c.value_and_grad)(params, padded)[2])
  for stats in results:
    np.testing.assert_array_equal(stats.uses['w']['A'], [lengths.sum()])
    rows = np.concatenate([np.asarray(x)[where[..., 0]], np.ones((int(lengths.sum()), 1))], 1)
    np.testing.assert_allclose(stats.means('w')['A'][0], rows.T @ rows / len(rows), rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), results[0].sums['w']['G'], results[1].sums['w']['G']
  )


def test_masks_of_other_axes_are_refused():
  with pytest.raises(kron.CurvatureError, match=r'where has shape \(4, 5\), x \(4, 5, 3\); give it as many axes'):
    kron.used(normal(4, 5, 3), jnp.ones((4, 5), bool))


def test_copies_explain_what_is_read_in_an_unknown_way():
  """A table of which each example reads other rows, in an order that depends on data."""
  params, x = {'table': normal(6, 3)}, normal(4, 3)

  def loss(p, x, mark=True):
    copies = jnp.broadcast_to(p['table'], (4, 6, 3))
    copies = kron.copies(copies) if mark else copies
    z = kron.observe.gaussian((jnp.sort(copies, 1)[:, :3] * x[:, None]).sum(1))
    return (z**2).mean()

  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  each = jax.vmap(jax.grad(lambda p, x: (((jnp.sort(p['table'], 0)[:3] * x).sum(0)) ** 2).mean()), (None, 0))(params, x)
  expected = (each['table'].reshape(4, -1) ** 2).mean(0)
  np.testing.assert_allclose(stats.means('table')['F'].reshape(-1), expected, rtol=1e-4)


@pytest.mark.parametrize('shape', [(4,), (1, 4), (1, 1, 4)])
def test_a_parameter_with_a_first_axis_of_one_beside_one_example(shape):
  """That axis is no examples': the block is that of the same numbers in a vector."""
  x, scale, shift = normal(1, 5, 4), normal(4, seed=2), normal(4, seed=3)

  def loss(p, x):
    z = kron.observe.gaussian((x * p['scale'] + p['shift']).sum(1))
    return (z**2).mean()

  params = {'scale': scale.reshape(shape), 'shift': shift.reshape(shape)}
  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  slope = 2 * (x * scale + shift).sum(1)[0] / 4
  u = np.stack([np.asarray(x.sum(1)[0] * slope), np.asarray(5 * slope)], -1)
  np.testing.assert_allclose(stats.means('scale')['F'], u[:, :, None] * u[:, None], rtol=1e-4)
