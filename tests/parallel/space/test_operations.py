"""Every operation in strips equals the whole one: results, gradients, at every number of strips, where rows do not divide
too.
"""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kronmesh import parallel
from kronmesh.parallel.space.halo import journeys
from kronmesh.parallel.space.windows import Window, need
from tests.draws import normal
from tests.parallel.space.operations import OPERATIONS, case, conv, errors

long = pytest.mark.long
PLACES = ((1, 16), (2, 19), (4, 16), (4, 19), (8, 5), (8, 19))  # strips, height


def mesh_of(n, columns=1):
  if columns > 1:
    return parallel.make_mesh(f'space={n},columns={columns}', jax.devices()[: n * columns])
  return parallel.make_mesh(f'data={8 // n},space={n}')


def fits(name, height):
  operation = OPERATIONS[name]
  return height % operation.multiple == 0 and height >= operation.least


@pytest.mark.brief('many', 'transposed')
@pytest.mark.parametrize('name', OPERATIONS)
def test_strips_equal_the_whole(name):
  height = 19 if fits(name, 19) else 18
  assert max(errors(*case(name, height, jnp.float32), mesh_of(4)).values()) <= 1e-6


@pytest.mark.long
@pytest.mark.parametrize('strips, height', PLACES)
@pytest.mark.parametrize('name', OPERATIONS)
def test_strips_equal_the_whole_in_f64(x64, name, strips, height):
  height = height if fits(name, height) else height + 1
  if not fits(name, height):
    pytest.skip('a height that the operation does not have')
  assert max(errors(*case(name, height, jnp.float64), mesh_of(strips)).values()) <= 1e-12


@pytest.mark.long
@pytest.mark.parametrize('name', ['strided', 'max pool', 'transposed', 'batch norm', 'resize up'])
def test_height_and_width_both_in_strips(x64, name):
  assert max(errors(*case(name, 19, jnp.float64), mesh_of(4, 2), columns=True).values()) <= 1e-12


windows = st.builds(
  Window,
  size=st.integers(1, 5),
  stride=st.integers(1, 4),
  low=st.integers(0, 3),
  high=st.integers(0, 3),
  base=st.integers(1, 3),
  dilation=st.integers(1, 3),
)


def least_rows(window, strip):
  """Returns the number of rows of other devices that all devices together read; no exchange can receive fewer."""
  wanted = need(window, strip)
  total = 0
  for i in range(strip.shards):
    places = range(*wanted.out.bounds[i : i + 2])
    touched = {p * window.stride - window.low + k * window.dilation for p in places for k in range(window.size)}
    rows = {t // window.base for t in touched if t % window.base == 0}
    rows_of_device = range(*strip.bounds[i : i + 2])
    total += sum(0 <= r < strip.size and r not in rows_of_device for r in rows)
  return total


def moved_rows(window, strip):
  """Returns the number of rows that travel."""
  wanted = need(window, strip)
  needed = journeys(strip, wanted.first, wanted.counts)
  return sum(int(j.length) * len(j.receivers) for j in needed if j.shift)


@given(windows, st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=300)
def test_no_row_travels_that_is_not_read(window, size, shards):
  """Up to rows between the first and the last that a window skips."""
  if window.places(size) == 0:
    return
  strip = parallel.Strip('space', shards, size)
  assert moved_rows(window, strip) >= least_rows(window, strip)
  if window.stride <= window.size and window.dilation == 1 and window.base == 1:
    assert moved_rows(window, strip) == least_rows(window, strip)


@pytest.mark.parametrize('height', [720, 1080, 2160, 4320])
@pytest.mark.parametrize('shards', [4, 16, 64])
def test_halos_of_a_network_are_the_least(height, shards):
  """Of a residual network's windows, whatever the height: no more than (window - stride) rows for each border."""
  strip, moved, least = parallel.Strip('space', shards, height), 0, 0
  stem, wide, skip, halving = Window(7, 2, 3, 3), Window(3, 1, 1, 1), Window(1, 2), Window(3, 2, 1, 1)
  for window in (stem, *[wide] * 4, *[skip, halving, *[wide] * 3] * 3):
    moved += moved_rows(window, strip)
    least += max(window.size - window.stride, 0) * (shards - 1)
    strip = strip if window is skip else need(window, strip).out
  assert moved <= 1.02 * least


def agrees(window, size, shards, groups, dtype, tolerance):
  if window.places(size) == 0:
    return
  fn = conv(
    (window.stride, 1), [(window.low, window.high), (0, 0)], (window.base, 1), (window.dilation, 1), groups=groups
  )
  x, w = normal(2, size, 3, 4).astype(dtype), normal(window.size, 2, 4 // groups, 4, seed=1).astype(dtype)
  assert max(errors(fn, x, w, mesh_of(shards)).values()) <= tolerance


@pytest.mark.long
@given(windows, st.integers(1, 24), st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]))
@settings(max_examples=2, deadline=None, derandomize=True)
def test_any_convolution(window, size, shards, groups):
  agrees(window, size, shards, groups, jnp.float32, 1e-6)


@pytest.mark.long
@given(windows, st.integers(1, 24), st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_convolution_in_f64(x64, window, size, shards, groups):
  agrees(window, size, shards, groups, jnp.float64, 1e-12)
