"""Inverses between steps: every inverse is renewed in its turn and none else, and with intervals of 1 nothing changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh import kron
from tests.draws import normal
from tests.kron.reference import close


def loss_fn(params, x, y):
  h = x
  for w in params['hidden']:
    h = jnp.tanh(h @ w)
  z = kron.observe.gaussian(h @ params['last'] + params['bias'])
  return 0.5 * ((z - y) ** 2).sum(-1).mean()


@functools.cache
def problem(layers=5, dtype='float64'):
  with jax.enable_x64(dtype == 'float64'):
    params = {
      'hidden': [normal(4, 4, seed=i) / 2 for i in range(layers)],
      'last': normal(4, 2),
      'bias': jnp.zeros(2),
    }
    x, y = normal(16, 4, seed=7), normal(16, 2, seed=8)
    params, x, y = jax.tree.map(lambda t: jnp.asarray(t, dtype), (params, x, y))
    return kron.curvature(loss_fn, params, x, y, fisher='empirical'), params, x, y


def test_intervals_of_one_change_nothing():
  with jax.enable_x64():
    curvature, params, x, y = problem()
    inside = kron.kfac(0.1, curvature, damping=0.01)
    tx = kron.kfac(0.1, curvature)
    keep = kron.inverse_schedule(curvature, damping=0.01, statistics_every=1, inverses_every=1)
    a, state_a = params, inside.init(params)
    b, state_b = params, tx.init(params)

    @jax.jit
    def whole(params, state):
      _, grads, stats = curvature.value_and_grad(params, x, y)
      updates, state = jax.jit(inside.update)(grads, state, params, stats=stats)
      return optax.apply_updates(params, updates), state

    @jax.jit
    def gradient(params, state):
      _, grads, stats = curvature.value_and_grad(params, x, y)
      return grads, keep.take(state, stats)

    @jax.jit
    def update(params, state, grads):
      updates, state = tx.update(grads, state, params, phase='plain')
      return optax.apply_updates(params, updates), state

    for step in range(5):
      a, state_a = whole(a, state_a)
      grads, state_b = gradient(b, state_b)
      b, state_b = update(b, keep.refresh(state_b, step), grads)
    jax.tree.map(lambda s, t: close(s, t, 1e-12), (a, state_a), (b, state_b))


@pytest.mark.long
@pytest.mark.parametrize('every, statistics_every', [(1, 1), (3, 1), (4, 2), (8, 8), (32, 5)])
def test_what_is_due_is_new_and_the_rest_is_old(every, statistics_every):
  """Against the inverse of all at once, slot by slot; over one interval and a half."""
  with jax.enable_x64():
    curvature, params, x, y = problem()
    tx = kron.scale_by_kfac(curvature, damping=0.01)
    options = {'statistics_every': statistics_every, 'inverses_every': every, 'grow': False}
    keep = kron.inverse_schedule(curvature, damping=0.01, **options)
    state = tx.init(params)
    _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
    all_new = jax.jit(lambda s, stats: tx.update(grads, s, params, stats=stats, phase='refresh')[1])
    seen = set()
    for step in range(3 * every // 2 + 1):
      scaled = stats._replace(sums=jax.tree.map(lambda s, step=step: s * (1 + step % 3), stats.sums))
      if keep.statistics_due(step):
        state = keep.take(state, scaled)
      before = jax.tree.map(np.asarray, state.inverses)
      expected = all_new(state._replace(averages=state.averages), None).inverses
      state = keep.refresh(state, step)
      due = {(u.stack, s) for u in keep.units if u.due(step, every) for s in range(u.first, u.first + u.width)}
      seen |= {(name, slot) for name, slot in due if slot < len(state.inverses[name])}
      for name, held in state.inverses.items():
        for slot in range(len(held)):
          close(held[slot], (expected if (name, slot) in due else before)[name][slot], 1e-12)
    assert seen == {(name, slot) for name, held in state.inverses.items() for slot in range(len(held))}


def test_what_is_not_finite_is_kept_out_and_counted_once():
  curvature, params, x, y = problem(dtype='float32')
  tx = kron.scale_by_kfac(curvature)
  keep = kron.inverse_schedule(curvature, damping=-100.0, inverses_every=3, grow=False)  # no factor is that large
  _, _, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  state = keep.take(tx.init(params), stats)
  before = jax.tree.map(np.asarray, state.inverses)
  for step in range(3):
    state = keep.refresh(state, step)
  jax.tree.map(lambda a, b: close(a, b, 1e-12), before, state.inverses)
  assert state.rejected_inverses == sum(len(held) for held in before.values())


@pytest.mark.long
def test_the_state_may_be_anywhere_in_a_chain():
  curvature, params, x, y = problem(dtype='float32')
  tx = optax.chain(optax.clip(1.0), kron.kfac(0.1, curvature))
  keep = kron.inverse_schedule(curvature)
  state = tx.init(params)
  structure = jax.tree.structure(state)
  _, _, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  state = keep.refresh(keep.take(state, stats), 0)
  assert jax.tree.structure(state) == structure
  with pytest.raises(kron.CurvatureError, match='holds 0 of ScaleByKfacState'):
    keep.refresh(optax.adam(1.0).init(params), 0)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'inverses_every': 0}, 'inverses_every=0 must be at least 1'),
    ({'statistics_every': -1}, 'statistics_every=-1 must be at least 1'),
  ],
)
def test_settings_that_cannot_be(options, words):
  with pytest.raises(kron.CurvatureError, match=words):
    kron.inverse_schedule(problem()[0], **options)


def test_a_growing_interval_is_the_same_on_host_and_device():
  every = kron.growing(24)
  steps = np.arange(600)
  found = jax.vmap(every)(jnp.asarray(steps))
  assert list(found) == [every(int(s)) for s in steps]
  assert [every(s) for s in (0, 31, 32, 63, 64, 128, 256, 511, 512, 10**6)] == [1, 1, 2, 2, 4, 8, 16, 16, 24, 24]
  with pytest.raises(kron.CurvatureError, match='an interval of 0 steps'):
    kron.growing(0)


STACKS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(stacks=STACKS, every=st.integers(1, 70), statistics_every=st.integers(1, 10))
def test_the_deal_of_units(stacks, every, statistics_every):
  """Every slot once in an interval, shorter intervals included; balanced; not where statistics are taken."""
  named = {f'{i}': kron.Stack(1, slots, slots, n, 'float32') for i, (slots, n) in enumerate(stacks)}
  layout = kron.Layout(named, {}, {}, {}, np.zeros(0), np.zeros(0), {})
  units = kron.deal_units(layout, every, statistics_every)
  slots = sorted((u.stack, s) for u in units for s in range(u.first, min(u.first + u.width, named[u.stack].slots)))
  assert slots == sorted((name, s) for name, stack in named.items() for s in range(stack.slots))
  for interval in {1, max(every // 2, 1), every}:
    for unit in units:
      assert sum(unit.due(step, interval) for step in range(7, 7 + interval)) == 1
  busy = [sum(u.work for u in units if u.due(step, every)) for step in range(every)]
  apart = statistics_every > 1 and every % statistics_every == 0
  usable = every - every // statistics_every if apart else every
  total, largest = sum(s.slots * s.n**3 for s in named.values()), max(u.work for u in units)
  assert max(busy) <= sum(u.work for u in units) / usable + largest  # as any deal to who has least
  share = total / usable
  assert largest <= max(share, max(s.n for s in named.values()) ** 3) * (1 + 1e-9)
  if apart:
    assert not any(busy[step] for step in range(0, every, statistics_every))


def test_intervals_start_from_one_unless_they_are_told_not_to_grow():
  curvature = problem()[0]
  taken = lambda **more: [kron.inverse_schedule(curvature, **more).statistics_due(step) for step in range(16)]  # noqa: E731
  assert all(taken()) and taken() == taken(statistics_every=8, grow=True)
  assert taken(grow=False) == [step % 8 == 0 for step in range(16)]
