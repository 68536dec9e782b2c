"""Which device owns which factor: fair, without devices, for ResNet-50's shapes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh import kron, models
from kronmesh.kron.operators.factor import Factor
from scripts.losses import problem
from tests.kron.reference import close


@pytest.fixture(scope='module')
def resnet50():
  model = models.ResNet(blocks=(3, 4, 6, 3), classes=1000, dtype=jnp.bfloat16)
  loss, params, args = problem(model, 64)
  return kron.curvature(loss, params, *args, has_aux=True).blocks


@pytest.mark.brief('True-2', 'False-8', 'False-64')
@pytest.mark.parametrize('owners', [2, 4, 8, 64])
@pytest.mark.parametrize('mem_opt', [False, True])
def test_resnet50_is_dealt_fairly(resnet50, owners, mem_opt):
  """The busiest device: within 1.1 of a fair share or the largest matrix, padding counted; MEM-OPT's memory too."""
  deal = kron.Deal(owners, mem_opt)
  found, least = kron.load(kron.lay_out(resnet50, deal)), kron.least(resnet50, deal)
  assert found.work <= 1.1 * least.work
  assert found.memory <= 1.1 * least.memory


@pytest.mark.parametrize('mem_opt', [False, True])
def test_past_the_largest_matrix_more_devices_are_faster(resnet50, mem_opt):
  work = {}
  for owners in (8, 64):
    deal = kron.Deal(owners, mem_opt)
    work[owners] = kron.load(kron.lay_out(resnet50, deal)).work
  assert work[64] <= work[8] / 4
  whole = kron.Deal(64, row_sharded=False)
  assert kron.load(kron.lay_out(resnet50, whole)).work >= 4608**3


def blocks_of(shapes):
  """Blocks with factors of these (slots, n_in, n_out)."""
  result = []
  for i, (slots, a, g) in enumerate(shapes):
    factors = {'A': Factor(slots, 1, a, a, 'G'), 'G': Factor(slots, 1, g, g, 'A')}
    result.append((f'b{i}', 'float32', tuple(factors.items())))
  return tuple(result)


SHAPES = st.lists(
  st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 9, 12, 30]), st.sampled_from([2, 9, 17])), min_size=1
)


DEALS = (SHAPES, st.sampled_from([1, 2, 4, 5, 6]), st.booleans(), st.booleans())


@settings(deadline=None, max_examples=3, derandomize=True)
@given(*DEALS)
def test_every_matrix_has_one_place(shapes, owners, local, row_sharded):
  check_places(shapes, owners, local, row_sharded)


@pytest.mark.long
@settings(deadline=None, max_examples=50)
@given(*DEALS)
def test_every_matrix_has_one_place_in_many_deals(shapes, owners, local, row_sharded):
  check_places(shapes, owners, local, row_sharded)


def check_places(shapes, owners, local, row_sharded):
  items = blocks_of(shapes)
  layout = kron.lay_out(items, kron.Deal(owners, local and owners > 1, row_sharded))
  seen = {name: set() for name in layout.stacks}
  values, draw = {}, np.random.default_rng(0)
  for block, _, factors in items:
    values[block] = {name: jnp.asarray(draw.standard_normal((f.rows, f.n, f.n)), jnp.float32) for name, f in factors}
    for name, f in factors:
      stack, index = layout.places[block, name]
      assert len(index) == f.rows and not seen[stack] & set(index.tolist())
      seen[stack] |= set(index.tolist())
  stacks = layout.gather(values)
  for name, stack in layout.stacks.items():
    assert stacks[name].shape == stack.shape and stack.count == len(seen[name])
  whole = layout.unpadded(stacks)
  for block, own in values.items():
    for name, x in own.items():
      np.testing.assert_array_equal(layout.read(stacks, block, name), x)
      np.testing.assert_array_equal(layout.read(whole, block, name), x)
  # A block's local inverses are kept by one owner, but for those that every device has.
  for block, _, factors in items:
    places = [(layout.stacks[layout.places[block, n][0]], layout.places[block, n][1]) for n, _ in factors]
    if local and not any(s.shared or s.row_sharded for s, _ in places):
      by = [index // s.slots for s, index in places]
      np.testing.assert_array_equal(*by)


@settings(deadline=None, max_examples=25)
@given(SHAPES, st.integers(1, 6))
def test_padding_is_the_least_there_can_be(shapes, owners):
  """One program runs on all owners, so that the largest share of a stack is what each pays."""
  layout = kron.lay_out(blocks_of(shapes), kron.Deal(owners, row_sharded=False))
  assert all(s.slots == math.ceil(s.count / owners) for s in layout.stacks.values())


@pytest.mark.long('4-5')
@pytest.mark.parametrize('devices, n', [(8, 40), (8, 37), (4, 5)])
def test_rows_of_an_inverse(devices, n):
  """Split over devices it is the inverse, and NaN throughout where there is none."""
  from jax.sharding import PartitionSpec as P

  from kronmesh.kron.state.inverse import split_inverse
  from kronmesh.parallel import make_mesh

  mesh = make_mesh(f'data={devices}', jax.devices()[:devices])
  stack = kron.Stack(devices, 2, 2, n, jnp.float32, row_sharded=True)
  x = np.random.default_rng(0).standard_normal((2, n, 2 * n)).astype(np.float32)
  m = jnp.asarray(x @ x.swapaxes(1, 2) / n)
  run = jax.jit(
    jax.shard_map(
      lambda rows, d: split_inverse(rows, d, ('data',)),
      mesh=mesh,
      in_specs=P('data'),
      out_specs=P('data'),
      check_vma=False,
    )
  )
  damping = jnp.broadcast_to(jnp.asarray([0.1, 0.5]), (devices, 2))
  found = stack.matrices(run(stack.put(m, None), damping))
  for k, d in enumerate((0.1, 0.5)):
    close(found[k], np.linalg.inv(np.asarray(m[k], np.float64) + d * np.eye(n)), 1e-5)
  assert np.isnan(stack.matrices(run(stack.put(-m, None), damping))).all()
