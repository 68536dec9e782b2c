"""`scale_by_kfac`: the optax link that keeps the factors and multiplies gradients by the inverse curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .blocks import param_names
from .curvature import Curvature
from .errors import CurvatureError
from .inverse import damped_inverse, slot_damping
from .stacks import Layout, lay_out
from .statistics import Statistics

Phase = Literal['plain', 'refresh']


class Placement(Protocol):
  """The seam through which stacks are spread over a mesh (`kronmesh.parallel.Placement`).

  owners: leading length of the stacks.
  over_stacks: makes a function of trees of arrays that lead with the owner axis into one that runs owner by owner, its
    results on every device.
  replicate: the same values on every device.

  An object rather than several arguments, as optax.inject_hyperparams takes numbers and functions for hyper-parameters.
  """

  owners: int

  def over_stacks(self, fn: Callable) -> Callable: ...

  def replicate(self, values: Any) -> Any: ...


class Local(NamedTuple):
  """The placement of a program that knows of no mesh."""

  owners: int = 1

  def over_stacks(self, fn: Callable) -> Callable:
    return fn

  def replicate(self, values: Any) -> Any:
    return values


class ScaleByKfacState(NamedTuple):
  """State of `scale_by_kfac`; stacks are named by the size of their matrices.

  factors: moving averages of the factors, not yet divided by `weights`.
  weights: (owner, slot), the sum of the averages' weights so far: at most 1, and 0 before the first statistics.
  inverses: damped inverses as of the last refresh; identities before the first.
  rejected_statistics, rejected_inverses: how many matrices were dropped so far for not being finite.
  """

  count: Int[Array, '']
  factors: dict[str, Float[Array, 'o s n n']]
  weights: dict[str, Float[Array, 'o s']]
  inverses: dict[str, Float[Array, 'o s n n']]
  rejected_statistics: Int[Array, '']
  rejected_inverses: Int[Array, '']


def scale_by_kfac(
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: int = 1,
  inverses_every: int = 1,
  placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiplies the gradient by the damped inverse of the curvature's blocks.

  For a kernel with gradient matrix V the result is
  $(A + \pi\sqrt\lambda I)^{-1} V (G + \sqrt\lambda/\pi\, I)^{-1}$, for a unit-wise block $(F + \lambda I)^{-1} v$.

  Args:
    curvature: from `kron.curvature`.
    damping: lambda, in the unit of the curvature (loss per squared parameter); a number or a schedule.
    decay: of the factors' moving averages, per use of statistics; debiased, so the first statistics count in full.
    statistics_every: of the updates that are given statistics, every how many-th counted from 0 takes them in.
    inverses_every: every how many updates the inverses are refreshed.
    placement: who owns which factors; None for one owner.

  Returns:
    A transformation whose `update` takes, beside optax's own arguments,
    stats: `Statistics`, or None for none at this step;
    phase: static; 'plain' leaves the factors' inverses as they are, 'refresh' recomputes them, None asks the counter.
      Then `statistics_every` does not apply either: what is given is taken.

  Raises:
    CurvatureError: the gradient lacks a part of a block (parameters that share a block must not be separated by
      optax.partition or optax.masked), or the phase is unknown.

  References:
    Martens and Grosse, 2015 (arXiv:1503.05671); Grosse and Martens, 2016 (arXiv:1602.01407); for scale and shift Osawa
    et al., 2020 (arXiv:2002.06015).
  """
  blocks, placement = curvature.blocks, placement or Local()
  layout = lay_out(blocks, placement.owners)

  def init(params):
    del params
    eyes = {
      s: jnp.broadcast_to(jnp.eye(n, dtype=layout.dtypes[s]), (o, k, n, n)) for s, (o, k, n, _) in layout.shapes.items()
    }
    return ScaleByKfacState(
      count=jnp.zeros((), jnp.int32),
      factors={s: jnp.zeros(shape, layout.dtypes[s]) for s, shape in layout.shapes.items()},
      weights={s: jnp.zeros(shape[:2], layout.dtypes[s]) for s, shape in layout.shapes.items()},
      inverses=eyes,
      rejected_statistics=jnp.zeros((), jnp.int32),
      rejected_inverses=jnp.zeros((), jnp.int32),
    )

  def update(updates, state, params=None, *, stats=None, phase: Phase | None = None, **extra):
    del params, extra
    if phase not in (None, 'plain', 'refresh'):
      raise CurvatureError(f"phase={phase!r} is unknown; choose 'plain', 'refresh' or None")
    count = state.count
    if stats is not None:
      rate = decay(count) if callable(decay) else decay
      due = _is_due(count, statistics_every) if phase is None else True
      state = _when(due, lambda s: _average(s, stats, layout, blocks, rate, placement), state)
    due = _is_due(count, inverses_every) if phase is None else phase == 'refresh'
    strength = damping(count) if callable(damping) else damping
    state = _when(due, lambda s: _refresh(s, layout, strength, placement), state)
    updates = _precondition(updates, state.inverses, layout, blocks, placement)
    return updates, state._replace(count=optax.safe_increment(count))

  return optax.GradientTransformationExtraArgs(init, update)


def _is_due(count: Int[Array, ''], every: Any) -> Any:
  """A static yes where the interval is the number 1; a traced interval (inject_hyperparams) is decided on the device."""
  return True if isinstance(every, int) and every == 1 else count % every == 0


def _when(due: Any, fn: Callable, state: ScaleByKfacState) -> ScaleByKfacState:
  if isinstance(due, bool):
    return fn(state) if due else state
  return jax.lax.cond(due, fn, lambda s: s, state)


def _average(
  state: ScaleByKfacState, stats: Statistics, layout: Layout, blocks, decay, placement: Placement
) -> ScaleByKfacState:
  """Takes the batch's means into the moving averages, but for matrices that are not finite."""
  some = stats.examples > 0
  means = {block.name: block.operator.combine(stats.means(block.name)) for block in blocks}
  new = layout.gather(placement.replicate(means))
  factors, weights, rejected = {}, {}, state.rejected_statistics
  for stack, x in new.items():
    finite = jnp.isfinite(x).all((-1, -2))
    take = finite & some
    rate = jnp.asarray(decay, x.dtype)
    old = state.factors[stack]
    factors[stack] = jnp.where(take[..., None, None], rate * old + (1 - rate) * x, old)
    weights[stack] = jnp.where(take, rate * state.weights[stack] + (1 - rate), state.weights[stack])
    rejected = rejected + (~finite & some).sum(dtype=jnp.int32)
  return state._replace(factors=factors, weights=weights, rejected_statistics=rejected)


def _refresh(state: ScaleByKfacState, layout: Layout, damping, placement: Placement) -> ScaleByKfacState:
  """Recomputes the inverses."""
  means = _debias(state)
  added = slot_damping(layout, means, jnp.asarray(damping), placement.replicate)
  inverses, dropped = placement.over_stacks(_renew)(means, added, state.weights, state.inverses)
  return state._replace(inverses=inverses, rejected_inverses=state.rejected_inverses + dropped.sum(dtype=jnp.int32))


def _renew(
  means: dict[str, Float[Array, 'o s n n']],
  damping: dict[str, Float[Array, 'o s']],
  weights: dict[str, Float[Array, 'o s']],
  old: dict[str, Float[Array, 'o s n n']],
) -> tuple[dict[str, Float[Array, 'o s n n']], Int[Array, 'o']]:
  """Damped inverses, and how many were dropped: a slot keeps its old one if the new is not finite or rests on nothing."""
  inverses, dropped = {}, []
  for stack, x in means.items():
    new = damped_inverse(x, damping[stack])
    finite, known = jnp.isfinite(new).all((-1, -2)), weights[stack] > 0
    inverses[stack] = jnp.where((finite & known)[..., None, None], new, old[stack])
    dropped.append((~finite & known).sum(1))
  return inverses, sum(dropped)


def _debias(state: ScaleByKfacState) -> dict[str, Array]:
  return {
    stack: x / jnp.where(state.weights[stack] > 0, state.weights[stack], 1)[..., None, None]
    for stack, x in state.factors.items()
  }


def _precondition(updates: Any, inverses: dict[str, Array], layout: Layout, blocks, placement: Placement) -> Any:
  """The gradient tree with every block multiplied by its inverse; parameters without a block pass."""
  leaves, treedef = jax.tree.flatten(updates)
  by_name = dict(zip(param_names(updates), leaves, strict=True))
  result = dict(by_name)
  for block in blocks:
    present = [name for name in block.params if name in by_name]
    if not present:
      continue  # another transformation's, under optax.partition or optax.masked
    if len(present) < len(block.params):
      missing = next(name for name in block.params if name not in by_name)
      raise CurvatureError(f'{missing!r} shares a block with {present[0]!r} but is not among the gradients; give both')
    # Whole on every device, as the inverses are: one gather here, where products of shards cost several collectives.
    gradients = placement.replicate([by_name[name] for name in block.params])
    v = block.operator.to_matrix(*gradients)
    u = block.operator.precondition(v, {f: layout.read(inverses, block.name, f) for f in block.operator.factors})
    u = block.operator.from_matrix(placement.replicate(u))
    mine = block.operator.from_matrix(jnp.ones_like(v)) if block.partial else [None] * len(u)
    for name, new, mask in zip(block.params, u, mine, strict=True):
      new = new.astype(by_name[name].dtype)
      # The pieces of a parameter leave one another's entries, and those that no piece holds, as they are.
      result[name] = new if mask is None else jnp.where(mask != 0, new, result[name])
  return jax.tree.unflatten(treedef, list(result.values()))


def factors(state: Any, curvature: Curvature) -> dict[str, dict[str, Float[Array, 'slots n n']]]:
  """The debiased factors of an optimiser state by the name of the block's first parameter: logical, without padding.

  Args:
    state: any optax state that holds one `ScaleByKfacState`.
    curvature: the one the optimiser was made with.
  """
  kfac_state = find_state(state)
  owners = next(iter(kfac_state.factors.values())).shape[0]
  layout, means = lay_out(curvature.blocks, owners), _debias(kfac_state)
  return {b.name: {name: layout.read(means, b.name, name) for name in b.operator.factors} for b in curvature.blocks}


def find_state(state: Any) -> ScaleByKfacState:
  """The only `ScaleByKfacState` inside an optax state."""
  is_state = lambda x: isinstance(x, ScaleByKfacState)  # noqa: E731
  found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
  if len(found) != 1:
    raise CurvatureError(f'the optimiser state holds {len(found)} K-FAC states; expected one')
  return found[0]
