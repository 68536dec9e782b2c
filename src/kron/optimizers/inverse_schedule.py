"""Computes K-FAC's inverses between steps, in small separate programs that are spread over an interval of steps.

A refresh inside of a step inverts everything at once. One step in many then takes several times as long, its memory
adds to the activations', and the program is compiled twice, with the refresh and without. Here the gradient's program
adds statistics (`InverseSchedule.take`), the host starts the inverses that are due (`InverseSchedule.refresh`: one small
program for each size of matrix), and the update's program applies them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ...program import is_known
from ..curvature import Curvature
from ..errors import CurvatureError
from ..placing import Local, Placement
from ..state.dealing import deal_of, lay_out
from ..state.inverse import slot_damping
from ..state.schedule import Interval, Unit, at, deal_units, growing, is_due
from ..state.stacks import Layout, check_layout
from ..statistics import Statistics
from .precondition import ScaleByKfacState, find_state, renewed, replace_state


class InverseSchedule(NamedTuple):
  """Holds the functions that `inverse_schedule` makes.

  Attributes:
    statistics_due: tells from a step's number whether the step takes statistics.
    take: (optimiser state, statistics) -> the state with them added to its averages; compile it with the gradient.
    refresh: (optimiser state, step) -> the state in which the inverses that are due are refreshed; call it from the
      host. It donates the inverses of the state, so the old state must not be used again. It also takes three options.
      `caution=` multiplies the damping. `when=` is a boolean on the device; if it is false, nothing changes.
      `everything=True` also refreshes inverses that are not due.
    units: the groups of inverses that are computed at once, and when they are due.
    programs: (optimiser state, or its shapes) -> the programs of `refresh` by name, 'damping' and one for each stack,
      with their arguments; they can be lowered for tables of costs.
  """

  statistics_due: Callable[[int], bool]
  take: Callable[[Any, Statistics], Any]
  refresh: Callable[..., Any]
  units: tuple[Unit, ...]
  programs: Callable[[Any], dict[str, tuple[Callable, tuple]]]


def inverse_schedule(
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: int = 8,
  inverses_every: int = 32,
  grow: bool = True,
  placement: Placement | None = None,
) -> InverseSchedule:
  """Makes functions that keep the factors and inverses of a `kfac` or `scale_by_kfac` state up to date.

  They replace the transformation's refresh: its update is then given no statistics and phase='plain'. With both
  intervals 1 the results equal those of `kfac(..., inverses_every=1)`.

  Args:
    curvature: from `kron.curvature`.
    damping: lambda, as in `scale_by_kfac`, whose own damping is then not used; a number or a schedule.
    decay: the decay of the moving averages, as in `scale_by_kfac`, whose own decay is then not used.
    statistics_every: the number of steps between two uses of statistics.
    inverses_every: the number of steps in which every inverse is renewed once.
    grow: whether both intervals start from 1, see `growing`.
    placement: the placement of the optimiser; None for one owner.

  Returns:
    An `InverseSchedule` of these functions.

  Raises:
    CurvatureError: an interval is below 1; or, when a function is called, the state does not contain one of
      `scale_by_kfac`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from kronmesh import kron
    >>> def loss_fn(params, x, y, key):
    ...   mean = kron.observe.gaussian(x @ params['w'] + params['b'])
    ...   return 0.5 * ((mean - y) ** 2).sum(-1).mean()
    >>> key = jax.random.key(0)
    >>> x = jax.random.normal(key, (32, 3)); y = x @ jnp.ones((3, 2)) + 1
    >>> params = {'w': jnp.zeros((3, 2)), 'b': jnp.zeros(2)}
    >>> curvature = kron.curvature(loss_fn, params, x, y, key)
    >>> tx, keep = kron.kfac(0.1, curvature), kron.inverse_schedule(curvature, damping=1e-3)
    >>> @jax.jit
    ... def gradient(params, state):
    ...   loss, grads, stats = curvature.value_and_grad(params, x, y, key)
    ...   return loss, grads, keep.take(state, stats)
    >>> @jax.jit
    ... def update(params, state, grads):
    ...   updates, state = tx.update(grads, state, params, phase='plain')
    ...   return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for step in range(60):
    ...   loss, grads, state = gradient(params, state)
    ...   state = keep.refresh(state, step)
    ...   params, state = update(params, state, grads)
    >>> float(loss) < 0.1
    True
  """
  for name, value in (('statistics_every', statistics_every), ('inverses_every', inverses_every)):
    if value < 1:
      raise CurvatureError(f'{name}={value} must be at least 1')
  blocks, placement = curvature.blocks, placement or Local()
  layout = lay_out(blocks, deal_of(placement))
  units = deal_units(layout, inverses_every, statistics_every)
  intervals: list[Interval] = [growing(n) if grow else n for n in (statistics_every, inverses_every)]
  widths = {unit.stack: unit.width for unit in units}
  made: dict[Any, Callable] = {}

  def compiled(name: str, fn: Callable, donate: tuple[int, ...], like: Any) -> Callable:
    """Compiles a function once for each name and set of result shardings."""
    traced = not all(is_known(x) for x in jax.tree.leaves(like))  # an outer vmap or jit decides the shardings
    shardings = None if traced else jax.tree.map(lambda x: x.sharding, like)
    key = name, None if traced else tuple(jax.tree.leaves(shardings))
    if key not in made:
      made[key] = jax.jit(fn) if traced else jax.jit(fn, donate_argnums=donate, out_shardings=shardings)
    return made[key]

  def added_to(averages, count, caution):
    return slot_damping(layout, averages.means(), jnp.asarray(at(damping, count)) * caution, placement.replicate)

  def damping_of(kfac: ScaleByKfacState, caution: Any = 1.0) -> tuple[Callable, tuple]:
    return compiled('damping', added_to, (), dict(kfac.averages.weights)), (kfac.averages, kfac.count, caution)

  def renewal_of(name: str, kfac, added, held, counts, first: int = 0, when: Any = True) -> tuple[Callable, tuple]:
    renew, averages = renew_slots(layout, name, widths[name], placement), kfac.averages
    args = averages.factors[name], averages.weights[name], added[name], held, counts, np.int32(first), when
    return compiled(name, renew, (3, 4), (held, counts)), args

  def programs(state: Any) -> dict[str, tuple[Callable, tuple]]:
    kfac = find_state(state)
    each = {
      name: renewal_of(name, kfac, kfac.averages.weights, held, _counts(kfac)) for name, held in kfac.inverses.items()
    }
    return {'damping': damping_of(kfac), **each}

  def take(state: Any, stats: Statistics) -> Any:
    kfac = find_state(state)
    check_layout(kfac, layout)
    averages = kfac.averages.add(stats, blocks, at(decay, kfac.count), placement)
    return replace_state(state, kfac._replace(averages=averages))

  def refresh(state: Any, step: int, *, caution: Any = 1.0, when: Any = True, everything: bool = False) -> Any:
    interval = at(intervals[1], step)
    due = [unit for unit in units if everything or unit.due(step, interval)]
    if not due:
      return state
    # A restored state may hold numpy arrays.
    kfac = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, find_state(state))
    inverses, counts = dict(kfac.inverses), _counts(kfac)
    find_damping, args = damping_of(kfac, caution)
    added = find_damping(*args)
    for unit in due:
      renew, args = renewal_of(unit.stack, kfac, added, inverses[unit.stack], counts, unit.first, when)
      inverses[unit.stack], counts = renew(*args)
    rejected, redamped = counts
    new = kfac._replace(inverses=kfac.inverses.filled(inverses), rejected_inverses=rejected, redamped_inverses=redamped)
    return replace_state(state, new)

  return InverseSchedule(lambda step: bool(is_due(step, intervals[0])), take, refresh, units, programs)


def _counts(kfac: ScaleByKfacState) -> tuple[Array, Array]:
  return kfac.rejected_inverses, kfac.redamped_inverses


def renew_slots(layout: Layout, name: str, width: int, placement: Placement) -> Callable:
  """Makes a function that renews `width` slots of each owner in one stack of inverses, from a traced first slot.

  The function takes the stack's factors, their weights, the damping to add, the stack's inverses as they are held, the
  numbers of inverses rejected and redamped so far, the first slot, and whether to renew at all. Near the end of the
  stack its window also covers slots before the first one, and it leaves those unchanged.
  """
  stack = layout.stacks[name]
  count = width if stack.row_sharded else stack.owners * width
  part = layout._replace(
    stacks={name: stack._replace(slots=width, count=count)},
    places={('', ''): (name, np.arange(count))},
    orders={name: None},
  )
  # The index of the matrix in each slot of each owner; padding has an index beyond all matrices.
  table = np.full(stack.slots if stack.row_sharded else stack.owners * stack.slots, stack.count, np.int32)
  table[layout.positions(name)] = np.arange(stack.count)
  table = table.reshape(-1, stack.slots)
  scattered = stack.shared and not np.array_equal(table, np.arange(stack.count)[None])
  along = 0 if stack.shared else 1  # the slot axis of the held inverses

  def renew(factors, weights, added, held, counts, first, when):
    start = jnp.minimum(first, stack.slots - width)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, 1)  # noqa: E731
    weights = cut(weights)
    means = cut(factors) / jnp.where(weights > 0, weights, 1)[..., None, None]
    wanted = jnp.where((start + jnp.arange(width) >= first) & when, weights, 0)
    if scattered:
      matrices = cut(jnp.asarray(table)).reshape(-1)
      old = jnp.take(held, matrices, 0, mode='clip')
    else:
      old = jax.lax.dynamic_slice_in_dim(held, start, width, along)
    args = ({name: means}, {name: cut(added)}, {name: wanted}, placement.own({name: old}, part), None)
    new, more = placement.over_stacks(lambda *parts: renewed(*parts, placement.axes))(*args)
    new = placement.share(new, part)[name]
    if scattered:
      held = held.at[matrices].set(new, mode='drop', unique_indices=True)
    else:
      held = jax.lax.dynamic_update_slice_in_dim(held, new, start, along)
    more = more.sum(0, dtype=jnp.int32)
    return held, (counts[0] + more[0], counts[1] + more[1])

  return renew
