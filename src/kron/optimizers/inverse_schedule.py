"""K-FAC's upkeep between steps: inverses in small programs of their own, dealt over the steps of an interval.

Inside of a step a refresh inverts everything at once: one step in many takes several times as long, its memory adds to the
activations', and the program is compiled once with it and once without. Here the gradient's program takes statistics in
(`Upkeep.take`), the host starts what is due of the inverses (`Upkeep.refresh`: one small program for each size of matrix),
and the update's program applies them.
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
from ..state.stacks import Layout
from ..statistics import Statistics
from .precondition import ScaleByKfacState, find_state, renewed, replace_state


class Upkeep(NamedTuple):
  """Made by `upkeep`.

  statistics_due: of a step's number, whether it takes statistics.
  take: (optimiser state, statistics) -> the state with them in its averages; to be compiled with the gradient.
  refresh: (optimiser state, step) -> the state with new inverses, of what is due; from the host. The state's inverses are
    donated: the state that went in is no longer to be used. Beside these, `caution=` multiplies the damping, `when=` (a
    boolean on the device) leaves all as it was where it is false, and `everything=True` renews what is not due, too.
  units: what is inverted at once, and when.
  programs: (optimiser state, or its shapes) -> the programs of `refresh` by name, 'damping' and one for each stack, with
    their arguments: to be lowered, for tables of costs.
  """

  statistics_due: Callable[[int], bool]
  take: Callable[[Any, Statistics], Any]
  refresh: Callable[..., Any]
  units: tuple[Unit, ...]
  programs: Callable[[Any], dict[str, tuple[Callable, tuple]]]


def upkeep(
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: int = 8,
  inverses_every: int = 32,
  grow: bool = True,
  placement: Placement | None = None,
) -> Upkeep:
  """Keeps the factors and inverses of `kfac`'s (or `scale_by_kfac`'s) state, in place of its own refresh.

  The update is then given no statistics and phase='plain'. With both intervals 1 the results are those of
  `kfac(..., inverses_every=1)`.

  Args:
    curvature, damping, decay, placement: as of `scale_by_kfac`, whose own damping and decay are not used then.
    statistics_every: every how many steps statistics are taken.
    inverses_every: in how many steps every inverse is renewed once.
    grow: whether both start from 1, see `growing`.

  Raises:
    CurvatureError: a setting that cannot be; or a state that does not hold one of `scale_by_kfac`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from kronmesh import kron
    >>> def loss_fn(params, x, y, key):
    ...   mean = kron.observe.gaussian(x @ params['w'] + params['b'])
    ...   return 0.5 * ((mean - y) ** 2).sum(-1).mean()
    >>> key = jax.random.key(0)
    >>> x = jax.random.normal(key, (32, 3)); y = x @ jnp.ones((3, 2)) + 1
    >>> params = {'w': jnp.zeros((3, 2)), 'b': jnp.zeros(2)}
    >>> curvature = kron.curvature(loss_fn, params, x, y, key)
    >>> tx, keep = kron.kfac(0.1, curvature), kron.upkeep(curvature, damping=1e-3)
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
    """Compiles a function once for each name and shardings of the results."""
    traced = not all(is_known(x) for x in jax.tree.leaves(like))  # by an outer vmap or jit, which says where things lie
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
    averages = kfac.averages.add(stats, layout, blocks, at(decay, kfac.count), placement)
    return replace_state(state, kfac._replace(averages=averages))

  def refresh(state: Any, step: int, *, caution: Any = 1.0, when: Any = True, everything: bool = False) -> Any:
    interval = at(intervals[1], step)
    due = [unit for unit in units if everything or unit.due(step, interval)]
    if not due:
      return state
    # A state that was read back may hold arrays of numpy.
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

  return Upkeep(lambda step: bool(is_due(step, intervals[0])), take, refresh, units, programs)


def _counts(kfac: ScaleByKfacState) -> tuple[Array, Array]:
  return kfac.rejected_inverses, kfac.redamped_inverses


def renew_slots(layout: Layout, name: str, width: int, placement: Placement) -> Callable:
  """A function that renews `width` slots of each owner in one stack of inverses, from a slot on that is no constant.

  Its arguments: the stack's factors, their weights, what the damping adds, its inverses as they are held, how many were
  rejected and redamped so far, the first slot, and whether to renew at all. Near the end of the stack it works on slots
  before the first one, and leaves them.
  """
  stack = layout.stacks[name]
  count = width if stack.row_sharded else stack.owners * width
  part = layout._replace(
    stacks={name: stack._replace(slots=width, count=count)},
    places={('', ''): (name, np.arange(count))},
    orders={name: None},
  )
  # Which matrix is in a slot of an owner; one beyond all for padding.
  table = np.full(stack.slots if stack.row_sharded else stack.owners * stack.slots, stack.count, np.int32)
  table[layout.positions(name)] = np.arange(stack.count)
  table = table.reshape(-1, stack.slots)
  scattered = stack.shared and not np.array_equal(table, np.arange(stack.count)[None])
  along = 0 if stack.shared else 1  # of what is held, the axis of slots

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
    new, more = placement.over_stacks(lambda *own: renewed(*own, placement.axes))(*args)
    new = placement.share(new, part)[name]
    if scattered:
      held = held.at[matrices].set(new, mode='drop', unique_indices=True)
    else:
      held = jax.lax.dynamic_update_slice_in_dim(held, new, start, along)
    more = more.sum(0, dtype=jnp.int32)
    return held, (counts[0] + more[0], counts[1] + more[1])

  return renew
