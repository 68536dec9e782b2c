"""Refreshes K-FAC's factors only as often as they change, by the staleness rule of SP-NGD.

A refresh compares a factor's new statistic X with those of the last two refreshes. If X differs from the last one, the
interval is halved. If it differs only from the one before, the interval stays. If it differs from neither, the interval
becomes the sum of the last two, so that the intervals of a factor at rest grow like Fibonacci numbers (Osawa et al.
2020, arXiv:2002.06015, algorithm 2).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ..curvature import Curvature
from ..errors import CurvatureError
from ..explicit import typed_update
from ..param_trees import match
from ..placing import Local, Placement
from ..state.averages import batch_means, observed
from ..state.dealing import lay_out, undivided
from ..state.schedule import at
from ..state.stacks import Layout, Stacked, for_layout
from .kfac import descend
from .precondition import NOT_GIVEN, ScaleByKfacState, apply_inverses, find_state, given, refreshed


class Staleness(NamedTuple):
  """Holds the times at which each factor is refreshed; arrays are by factor, in the order of `kron.intervals`.

  Attributes:
    interval: the last interval, in updates.
    before: the interval before that, in updates.
    next: the update (counted from 0) at which the factor is due.
    refreshes: the number of refreshes so far.
    last_factors: the statistics X of the last refresh, in stacks.
    before_factors: the statistics X of the refresh before that, in stacks.
  """

  interval: Int[Array, ' f']
  before: Int[Array, ' f']
  next: Int[Array, ' f']
  refreshes: Int[Array, ' f']
  last_factors: Stacked
  before_factors: Stacked


class ScaleByStaleKfacState(NamedTuple):
  """Holds the state of `scale_by_stale_kfac`.

  Attributes:
    kfac: the averages and inverses, as in `scale_by_kfac`.
    staleness: the times at which each factor is refreshed.
    refreshes_saved: the share of all possible refreshes that were not needed so far.
  """

  kfac: ScaleByKfacState
  staleness: Staleness
  refreshes_saved: Float[Array, '']


def scale_by_stale_kfac(
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  decay: optax.ScalarOrSchedule = 0.0,
  threshold: float = 0.1,
  smallest: int = 1,
  largest: int = 1000,
  placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Preconditions like `scale_by_kfac`, with an interval for each factor that follows how much the factor changes.

  A refresh compares a factor's new statistic X with those of the last two refreshes. X differs from Y if
  $|X - Y|_F \ge$ threshold $|Y|_F$. If X differs from the last one, the interval is halved. If it differs only from the
  one before, the interval stays. If it differs from neither, the interval becomes the sum of the last two.

  Args:
    curvature: from `kron.curvature`.
    damping: as in `scale_by_kfac`.
    decay: the decay of the moving averages for each update that has passed: after k updates the old average has weight
      decay^k. With 0, as in the paper, only the last statistic counts.
    threshold: alpha of the paper. The noise of a batch must lie below it, or no factor ever rests.
    smallest: the shortest interval, in updates.
    largest: the longest interval, in updates.
    placement: as in `scale_by_kfac`.

  Returns:
    A transformation whose `update` takes `stats=` and `damping=` as `scale_by_kfac` does. If the statistics come from
    `value_and_grad(..., statistics=kron.due(state, curvature))`, only those that are due are computed. A factor whose
    statistics are not finite is due again at once.

  Raises:
    CurvatureError: a setting is out of range; or, when `update` is called, for any reason that `scale_by_kfac` names.

  References:
    Osawa et al., 2020 (arXiv:2002.06015), algorithm 2.
  """
  if not 1 <= smallest <= largest or not threshold > 0:
    raise CurvatureError(
      f'threshold={threshold}, smallest={smallest}, largest={largest}: 0 < threshold, 1 <= smallest <= largest'
    )
  blocks, placement = curvature.blocks, placement or Local()
  layout = lay_out(blocks, undivided(placement))
  names = _names(curvature)

  def init(params):
    match(params, curvature.parameters)
    number = jnp.zeros(len(names), jnp.int32)
    empty = layout.zeros()
    staleness = Staleness(number, number, number, number, empty, empty)
    kfac = ScaleByKfacState.of_nothing(layout)
    return ScaleByStaleKfacState(kfac, staleness, jnp.zeros((), jnp.float32))

  def update(updates, state, params=None, *, stats=NOT_GIVEN, phase=None, **extra):
    del params
    stats = given(stats, phase)
    count = state.kfac.count
    if stats is not None:
      strength = at(damping, count) if extra.get('damping') is None else extra['damping']
      now = _due(state.staleness, count, curvature) & (stats.examples > 0)

      def take(state):
        return _take(state, stats, now, strength, at(decay, count))

      state = jax.lax.cond(now.any(), take, lambda s: s, state)
    updates = apply_inverses(updates, state.kfac.inverses, curvature, layout, placement)
    count = optax.safe_increment(count)
    saved = 1 - state.staleness.refreshes.sum() / (len(names) * count)
    return updates, ScaleByStaleKfacState(state.kfac._replace(count=count), state.staleness, saved.astype(jnp.float32))

  def _take(state, stats, now, strength, rate):
    kfac, old = state.kfac, state.staleness
    new = batch_means(stats, layout, blocks, placement)
    apart = functools.partial(_apart, layout=layout, names=names, placement=placement)
    known = observed(stats, layout, blocks)
    finite = placement.replicate({s: jnp.isfinite(x).all((-1, -2)) for s, x in new.items()})
    # A factor counts as refreshed if the batch used any of its slots; one that was not used at all stays due.
    taken = now & jnp.stack([layout.read(finite, *name).all() & layout.read(known, *name).any() for name in names])
    differs, differed = apart(new, old.last_factors) >= threshold, apart(new, old.before_factors) >= threshold
    follow = jnp.where(differs, old.interval // 2, jnp.where(differed, old.interval, old.interval + old.before))
    interval = jnp.clip(follow, smallest, largest)
    passed = jnp.maximum(old.interval, 1)
    flags = _on_slots(taken, layout, names)
    rates = _on_slots(rate ** passed.astype(jnp.float32), layout, names)
    wanted = _on_slots(now, layout, names)
    averages = kfac.averages.add_means(new, {s: wanted[s] & known[s] for s in wanted}, rates)
    keep = lambda a, b: b.filled({s: jnp.where(flags[s][..., None, None], a[s], b[s]) for s in b})  # noqa: E731
    staleness = Staleness(
      interval=jnp.where(taken, interval, old.interval),
      before=jnp.where(taken, old.interval, old.before),
      next=jnp.where(taken, kfac.count + interval, old.next),
      refreshes=old.refreshes + taken,
      last_factors=keep(new, old.last_factors),
      before_factors=keep(old.last_factors, old.before_factors),
    )
    # The damping of A and G depends on both, so their inverses are renewed together.
    only = _on_slots(_any_of_block(taken, curvature), layout, names)
    kfac = refreshed(kfac._replace(averages=averages), layout, strength, placement, only)
    return ScaleByStaleKfacState(kfac, staleness, state.refreshes_saved)

  return optax.GradientTransformationExtraArgs(init, typed_update(for_layout(update, layout)))


def _names(curvature: Curvature) -> list[tuple[str, str]]:
  return [(b.name, f) for b in curvature.blocks for f in b.operator.factors]


def _any_of_block(flags: Bool[Array, ' f'], curvature: Curvature, transposed_only: bool = False) -> Bool[Array, ' f']:
  """Sets the flag of each factor if any factor of the same block has it set."""
  start = 0
  for block in curvature.blocks:
    stop = start + len(block.operator.factors)
    if block.operator.transposed or not transposed_only:
      flags = flags.at[start:stop].set(flags[start:stop].any())
    start = stop
  return flags


def _due(staleness: Staleness, count: Int[Array, ''], curvature: Curvature) -> Bool[Array, ' f']:
  """Tells which factors are due.

  The two factors of a kernel that is also used transposed are due together, because its statistics make both.
  """
  return _any_of_block(staleness.next <= count, curvature, transposed_only=True)


def _apart(
  new: Mapping[str, Array], old: Mapping[str, Array], layout: Layout, names: list, placement: Placement
) -> Array:
  """Returns |X - Y| / |Y| of each factor; infinite where Y is zero, as before the first refresh."""
  squares = lambda trees: placement.replicate({s: (x * x).sum((-1, -2)) for s, x in trees.items()})  # noqa: E731
  change, size = squares({s: new[s] - old[s] for s in new}), squares(old)
  total = lambda slots: jnp.stack([layout.read(slots, *name).sum() for name in names])  # noqa: E731
  change, size = total(change), total(size)
  return jnp.where(size > 0, jnp.sqrt(change / jnp.where(size > 0, size, 1)), jnp.inf)


def _on_slots(values: Array, layout: Layout, names: list) -> dict[str, Array]:
  """Copies each factor's number to all of its slots, (owner, slot) by stack; padding gets zero or False."""
  padded = jnp.concatenate([values, jnp.zeros_like(values[:1])])
  result = {}
  for stack, layout_of_stack in layout.stacks.items():
    index = np.full(layout_of_stack.shape[:2], len(names), np.int32)
    for i, name in enumerate(names):
      where, positions = layout.places[name]
      if where == stack:
        index.reshape(-1)[positions] = i
    result[stack] = padded[index]
  return result


def due(state: Any, curvature: Curvature) -> dict[str, dict[str, Bool[Array, '']]]:
  """Returns which factors the next update will take, for `value_and_grad(..., statistics=)`.

  Args:
    state: an optax state that contains the state of one `scale_by_stale_kfac`.
    curvature: the curvature that the optimiser was made with.

  Returns:
    block -> factor -> a boolean of shape (). The two factors of a kernel that is also used transposed are due together,
    because its statistics make both.

  Raises:
    CurvatureError: there is no such state, or there are several.
  """
  stale = find_state(state, ScaleByStaleKfacState)
  flags = _due(stale.staleness, stale.kfac.count, curvature)
  return _nested(flags, curvature)


def intervals(state: Any, curvature: Curvature) -> dict[str, dict[str, Int[Array, '']]]:
  """Returns the current interval of each factor, in updates.

  Args:
    state: an optax state that contains the state of one `scale_by_stale_kfac`.
    curvature: the curvature that the optimiser was made with.

  Returns:
    block -> factor -> a whole number of shape (); 0 before the factor's first refresh.

  Raises:
    CurvatureError: there is no such state, or there are several.
  """
  return _nested(find_state(state, ScaleByStaleKfacState).staleness.interval, curvature)


def _nested(values: Array, curvature: Curvature) -> dict[str, dict[str, Array]]:
  result: dict[str, dict[str, Array]] = {}
  for i, (block, factor) in enumerate(_names(curvature)):
    result.setdefault(block, {})[factor] = values[i]
  return result


def stale_kfac(
  learning_rate: optax.ScalarOrSchedule,
  curvature: Curvature,
  *,
  momentum: optax.ScalarOrSchedule = 0.9,
  kl_clip: optax.ScalarOrSchedule | None = 0.1,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  **settings: Any,
) -> optax.GradientTransformationExtraArgs:
  """Makes `kfac` with `scale_by_stale_kfac` instead of `scale_by_kfac`.

  Args:
    learning_rate: a number or a schedule.
    curvature: from `kron.curvature`.
    momentum: as in `kfac`.
    kl_clip: as in `kfac`.
    weight_decay: as in `kfac`.
    **settings: `damping`, `decay`, `threshold`, `smallest`, `largest` and `placement` of `scale_by_stale_kfac`.

  Returns:
    A transformation whose `update` takes `stats=` and `damping=`, see `scale_by_stale_kfac`.
  """
  natural = scale_by_stale_kfac(curvature, **settings)
  return descend(natural, learning_rate, momentum=momentum, kl_clip=kl_clip, weight_decay=weight_decay)
