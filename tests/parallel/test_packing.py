"""Symmetric matrices packed to half, and back: whole, or by rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh.parallel.packing import fold, half_width, kept, mirrored, packed_shape, skew, unfold, unskew


def symmetric(n):
  x = np.random.default_rng(n).standard_normal((2, 3, n, n)).astype(np.float32)
  return jnp.asarray(x + x.swapaxes(-1, -2))


@pytest.mark.long('10', '1', '2', '4')
@pytest.mark.parametrize('n', [1, 2, 3, 4, 7, 10])
def test_triangles(n):
  packed = fold(symmetric(n))
  assert packed.shape[-2:] == packed_shape(n) and packed.shape[-1] * packed.shape[-2] == n * (n + 1) // 2
  np.testing.assert_array_equal(unfold(packed, n), symmetric(n))


@pytest.mark.brief('2-2', '2-7')
@pytest.mark.parametrize('n', [2, 3, 4, 7, 10])
@pytest.mark.parametrize('r', [1, 2, 3])
def test_rows(n, r):
  """All rows by themselves make the whole; a few are the same entries as of the whole."""
  x = symmetric(n)
  whole = skew(x)
  assert whole.shape[-1] == half_width(n)
  np.testing.assert_array_equal(mirrored(unskew(whole, n)), x)
  for first in range(0, n - r + 1, r):
    rows = skew(x[..., first : first + r, :], first)
    np.testing.assert_array_equal(rows, whole[..., first : first + r, :])
    expected = np.where(kept(r, n, first), x[..., first : first + r, :], 0)
    np.testing.assert_array_equal(unskew(rows, n, first), expected)
