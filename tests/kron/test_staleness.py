"""Factors refreshed as often as they change, against the rule written plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from tests.draws import normal
from tests.kron.gallery import GALLERY, N, squared
from tests.kron.reference import close

PARAMS = {'w': jnp.ones((4, 3)), 'b': jnp.ones(3)}


def loss(params, x, size):
  """`size` scales the outputs: the gradients, and so G, grow with it, and A with x."""
  return squared((x @ params['w'] + params['b']) * size, y=0.0)


CURVATURE = kron.curvature(loss, PARAMS, jnp.ones((N, 4)), jnp.ones(()), fisher='exact')


@jax.jit
def statistics(state, x, size):
  return CURVATURE.value_and_grad(PARAMS, x, size, statistics=kron.due(state, CURVATURE))[1:]


def follow_plainly(changes, threshold, smallest, largest):
  """Algorithm 2 of SP-NGD for one factor of size `changes[t]` at step t: the steps of its refreshes, its intervals."""
  apart = lambda x, y: y == 0 or abs(x - y) / y >= threshold  # noqa: E731
  last = before = interval = interval_before = due = 0
  refreshes, intervals = [], []
  for t, x in enumerate(changes):
    if t >= due:
      if apart(x, last):
        new = interval // 2
      elif apart(x, before):
        new = interval
      else:
        new = interval + interval_before
      new = min(max(new, smallest), largest)
      interval, interval_before, last, before, due = new, interval, x, last, t + new
      refreshes.append(t)
    intervals.append(interval)
  return refreshes, intervals


SIZES = {
  'at rest': lambda t: 1.0,
  'growing': lambda t: 1.05**t,
  'settling': lambda t: 1 + 5 * 0.9**t,
  'a jump': lambda t: 1.0 + (t > 30),
  'restless': lambda t: 1.0 + t % 2,
}


@pytest.mark.brief('settling-bounds1', 'a jump-bounds0', 'growing-bounds1')
@pytest.mark.parametrize('bounds', [(1, 1000), (2, 6)])
@pytest.mark.parametrize('sizes', SIZES)
def test_the_rule(sizes, bounds):
  steps, threshold = 60, 0.1
  tx = kron.scale_by_stale_kfac(CURVATURE, threshold=threshold, smallest=bounds[0], largest=bounds[1])
  x, state = normal(N, 4), tx.init(PARAMS)
  changes = [SIZES[sizes](t) for t in range(steps)]  # of G; A is at rest

  @jax.jit
  def step(state, size):
    due = kron.due(state, CURVATURE)
    grads, stats = statistics(state, x, jnp.sqrt(size))
    return due, jax.jit(tx.update)(grads, state, stats=stats)[1]

  taken, shown = {'A': [], 'G': []}, {'A': [], 'G': []}
  for t in range(steps):
    due, state = step(state, changes[t])
    for f in taken:
      taken[f] += [t] if due['w'][f] else []
      shown[f].append(int(kron.intervals(state, CURVATURE)['w'][f]))
  for f, plain in {'A': [1.0] * steps, 'G': changes}.items():
    refreshes, intervals = follow_plainly(plain, threshold, *bounds)
    assert taken[f] == refreshes and shown[f] == intervals
  if sizes == 'at rest' and bounds[0] == 1:
    assert taken['A'] == [0, 1, 2, 4, 7, 12, 20, 33, 54]
  close(state.refreshes_saved, 1 - (len(taken['A']) + len(taken['G'])) / (2 * steps), 1e-6)


@pytest.mark.long
def test_a_restless_run_equals_kfac():
  """Where everything is due at every step, the updates are those of K-FAC with the same averages."""
  for decay in (0.0, 0.9):
    stale = kron.scale_by_stale_kfac(CURVATURE, threshold=1e-9, decay=decay, damping=1e-2)
    plain = kron.scale_by_kfac(CURVATURE, decay=decay, damping=1e-2)
    states = stale.init(PARAMS), plain.init(PARAMS)
    for t in range(4):
      grads, stats = statistics(states[0], normal(N, 4, seed=t), 1.0 + t)
      a, first = jax.jit(stale.update)(grads, states[0], stats=stats)
      b, second = jax.jit(plain.update)(grads, states[1], stats=stats)
      states = first, second
      assert optax.tree.norm(optax.tree.sub(a, b)) < 1e-5 * optax.tree.norm(a)
    assert states[0].refreshes_saved == 0


def test_between_refreshes_old_inverses_serve_and_averages_fade_by_the_steps_passed():
  tx = kron.scale_by_stale_kfac(CURVATURE, decay=0.5, damping=1e-2)
  state = tx.init(PARAMS)
  for t in range(5):  # due at 0, 1, 2 and 4
    grads, stats = statistics(state, normal(N, 4), 1.0)
    before = state
    updates, state = jax.jit(tx.update)(grads, state, stats=stats)
    same = jax.tree.all(
      jax.tree.map(lambda a, b: (a == b).all(), before.kfac, state.kfac._replace(count=before.kfac.count))
    )
    assert bool(same) == (t == 3)
    assert optax.tree.norm(optax.tree.sub(updates, grads)) > 0.5  # the old inverses serve
  close(state.kfac.averages.weights['n3'][0, 0], 1 - 0.5 ** (1 + 1 + 1 + 2), 1e-6)


def test_what_is_not_finite_is_due_again_and_counted():
  tx = kron.scale_by_stale_kfac(CURVATURE)
  state = tx.init(PARAMS)
  grads, stats = statistics(state, normal(N, 4), 1.0)
  spoiled = stats._replace(sums={'w': {**stats.sums['w'], 'G': stats.sums['w']['G'] * jnp.nan}})
  _, state = jax.jit(tx.update)(grads, state, stats=spoiled)
  due = kron.due(state, CURVATURE)['w']
  assert due['A'] and due['G']
  assert kron.intervals(state, CURVATURE)['w'] == {'A': 1, 'G': 0}
  assert state.kfac.averages.rejected_statistics == 1
  updates, state = jax.jit(tx.update)(grads, state, stats=stats)
  assert kron.intervals(state, CURVATURE)['w'] == {'A': 1, 'G': 1}
  assert jnp.isfinite(updates['w']).all()


@pytest.mark.parametrize('phase', [None, 'plain'])
def test_steps_without_statistics_change_nothing(phase):
  tx = kron.scale_by_stale_kfac(CURVATURE)
  state = tx.init(PARAMS)
  grads, _ = statistics(state, normal(N, 4), 1.0)
  _, state = tx.update(grads, state, stats=None, phase=phase)
  assert kron.due(state, CURVATURE)['w']['A'] and state.kfac.count == 1 and state.refreshes_saved == 1


def of_gallery(name):
  case = GALLERY[name]()
  return case.loss, case.params, case.args, {}


def in_a_shard_map():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  local = lambda p, x: jax.lax.pmean(squared(jnp.tanh(x @ p['w']) @ p['out']), 'data')  # noqa: E731
  spec = jax.sharding.PartitionSpec
  loss = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec())
  return loss, {'w': normal(4, 3), 'out': normal(3, 2)}, (normal(8, 4),), {}


def reduced():
  loss = lambda p, x: squared(jnp.tanh(x @ p['w']).mean(1) @ p['out'])  # noqa: E731
  return loss, {'w': normal(4, 3), 'out': normal(3, 2)}, (normal(N, 5, 4),), {'sharing': {'w': 'reduce'}}


def unitwise():
  loss = lambda p, x: squared(jnp.tanh(x @ p['w']) @ p['out'])  # noqa: E731
  return loss, {'w': normal(4, 3), 'out': normal(3, 2)}, (normal(N, 4),), {'approximation': {'w': 'unit'}}


BRIEF = {
  'MLP': lambda: of_gallery('MLP'),
  'in a shard_map': in_a_shard_map,
  'reduced': reduced,
  'unit-wise': unitwise,
  'a scan': lambda: of_gallery('GPT, tied, scan over layers, remat'),
}
LONG = ['MobileNet with squeeze and excite', 'mixture of experts', 'T5', 'GRU in haiku', 'SIREN as a PINN']
CASES = [*BRIEF, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)]


@pytest.mark.long(
  'in a shard_map-sampled', 'a scan-sampled', 'a scan-empirical', 'reduced-sampled', 'unit-wise-sampled'
)
@pytest.mark.parametrize('fisher', ['sampled', 'empirical'])
@pytest.mark.parametrize('name', CASES)
def test_statistics_of_what_is_due(name, fisher):
  """The due factors' sums are as ever, the others' zero; gradients do not change."""
  loss, params, args, settings = BRIEF[name]() if name in BRIEF else of_gallery(name)
  curvature = kron.curvature(loss, params, *args, fisher=fisher, **settings)
  names = [(b.name, f) for b in curvature.blocks for f in b.operator.factors]
  flags: dict = {}
  for i, (block, factor) in enumerate(names):
    flags.setdefault(block, {})[factor] = jnp.asarray(i % 3 == 0)
  run = jax.jit(lambda due: curvature.value_and_grad(params, *args, key=jax.random.key(0), statistics=due))
  (_, grads, stats), (_, all_grads, every) = run(flags), run(jax.tree.map(jnp.ones_like, flags))
  for block in curvature.blocks:
    together = block.operator.transposed and any(flags[block.name].values())
    for k, s in stats.sums[block.name].items():
      wanted = together or flags[block.name].get(k, False)
      if wanted:
        close(s, every.sums[block.name][k], 1e-5)
      elif not block.sampled_diagonal:
        assert (s == 0).all()
  assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-7), grads, all_grads))
  nothing = run(jax.tree.map(jnp.zeros_like, flags))[2]
  assert nothing.examples == 0


def test_settings_that_cannot_be():
  for settings, words in (
    ({'threshold': 0.0}, 'threshold=0'),
    ({'smallest': 5, 'largest': 2}, 'largest=2'),
  ):
    with pytest.raises(kron.CurvatureError, match=words):
      kron.scale_by_stale_kfac(CURVATURE, **settings)
  with pytest.raises(kron.CurvatureError, match='holds 0 of ScaleByStaleKfacState'):
    kron.due(optax.EmptyState(), CURVATURE)


@pytest.mark.long
def test_a_chain_learns_and_its_state_goes_through_its_logical_form():
  tx = kron.stale_kfac(0.3, CURVATURE, damping=1e-2, momentum=0.0)
  params, state = PARAMS, tx.init(PARAMS)
  x = normal(N, 4)
  first = loss(params, x, 1.0)
  for _ in range(10):
    _, grads, stats = CURVATURE.value_and_grad(params, x, 1.0, statistics=kron.due(state, CURVATURE))
    updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
    params = optax.apply_updates(params, updates)
  assert loss(params, x, 1.0) < 0.3 * first
  three = kron.stale_kfac(0.3, CURVATURE, damping=1e-2, momentum=0.0, placement=kron.Local(3)).init(PARAMS)
  there = kron.from_logical(kron.to_logical(state), three)
  back = kron.from_logical(kron.to_logical(there), state)
  assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), state, back))
