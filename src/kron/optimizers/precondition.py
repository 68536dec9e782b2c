"""`scale_by_kfac`: the optax link that keeps the factors and multiplies gradients by the inverse curvature."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ..blocks.block import Block
from ..curvature import Curvature
from ..errors import CurvatureError
from ..explicit import typed_update
from ..param_trees import match
from ..placing import Local, Placement
from ..state.at_owners import precondition_at_owners
from ..state.averages import Averages
from ..state.dealing import deal_of, lay_out
from ..state.inverse import slot_damping, split_inverse, sure_inverse
from ..state.schedule import Interval, at, is_due
from ..state.stacks import Layout, Stacked, for_layout
from ..statistics import Statistics

Phase = Literal['plain', 'refresh']


class ScaleByKfacState(NamedTuple):
  """Holds the state of `scale_by_kfac`.

  Attributes:
    count: the number of updates so far.
    averages: the moving averages of the factors, in stacks.
    inverses: the damped inverses at the last refresh, in stacks; identities before the first.
    rejected_inverses: the number of inverses dropped so far because they were not finite.
    redamped_inverses: the number of inverses so far that needed more damping than the given one.
  """

  count: Int[Array, '']
  averages: Averages
  inverses: Stacked
  rejected_inverses: Int[Array, '']
  redamped_inverses: Int[Array, '']

  @classmethod
  def of_nothing(cls, layout: Layout) -> ScaleByKfacState:
    none = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    return cls(none(), Averages.of_nothing(layout), layout.identities(), none(), none())


def scale_by_kfac(
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: Interval = 1,
  inverses_every: Interval = 1,
  placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiplies the gradient by the damped inverse of the curvature's blocks.

  For a kernel with gradient matrix V the result is
  $(A + \pi\sqrt\lambda I)^{-1} V (G + \sqrt\lambda/\pi\, I)^{-1}$, where $\pi^2$ is the ratio of the mean diagonals of
  A and G (Martens and Grosse 2015, section 6.3); for a unit-wise block it is $(F + \lambda I)^{-1} v$.

  Args:
    curvature: from `kron.curvature`.
    damping: lambda, in the unit of the curvature (loss per squared parameter); a number or a schedule.
    decay: the decay of the factors' moving averages for each use of statistics. The averages are debiased, so the first
      statistics count in full.
    statistics_every: an update that is given statistics uses them if its number, counted from 0, is a multiple of this.
      It is a number, or a function of the update such as `growing` makes.
    inverses_every: the number of updates between two refreshes of the inverses, or such a function. A refresh renews
      all inverses at once; `inverse_schedule` spreads them.
    placement: decides who owns which factors; None for one owner.

  Returns:
    A transformation whose `update` takes three arguments besides optax's. `stats=` is a `Statistics`, or None for a
    step without; it must be given unless phase='plain'. `phase=` is static: 'plain' leaves the factors' inverses as
    they are, 'refresh' recomputes them, and None follows the counter of updates. With 'plain' or 'refresh',
    `statistics_every` does not apply: all given statistics are used. `damping=` replaces the transformation's damping,
    as `adapt_damping` does.

  Raises:
    CurvatureError: the gradient lacks a parameter that is not masked, lacks a part of a block (optax.partition and
      optax.masked must not separate parameters that share one), or has an additional parameter; stats= is left out; the
      phase is unknown.

  References:
    Martens and Grosse, 2015 (arXiv:1503.05671); Grosse and Martens, 2016 (arXiv:1602.01407); for scale and shift Osawa
    et al., 2020 (arXiv:2002.06015).
  """
  blocks, placement = curvature.blocks, placement or Local()
  layout = lay_out(blocks, deal_of(placement))

  def init(params):
    match(params, curvature.parameters)
    return ScaleByKfacState.of_nothing(layout)

  def update(updates, state, params=None, *, stats=NOT_GIVEN, phase: Phase | None = None, **extra):
    del params
    stats = given(stats, phase)
    count = state.count
    strength = at(damping, count) if extra.get('damping') is None else extra['damping']
    state = state._replace(averages=averaged(state, stats, phase, blocks, decay, statistics_every, placement))
    due = is_due(count, inverses_every) if phase is None else phase == 'refresh'
    state = when(due, lambda s: refreshed(s, layout, strength, placement), state)
    updates = apply_inverses(updates, state.inverses, curvature, layout, placement)
    return updates, state._replace(count=optax.safe_increment(count))

  return optax.GradientTransformationExtraArgs(init, typed_update(for_layout(update, layout)))


class NotGiven(NamedTuple):
  """A marker for statistics that were not passed to an update at all, which is different from None."""


NOT_GIVEN = NotGiven()


def given(stats: Statistics | NotGiven | None, phase: Any) -> Statistics | None:
  """Returns the statistics of an update, or None for a step without statistics.

  Raises:
    CurvatureError: stats= was left out, so that the step would be plain descent; optax.MultiSteps makes the call, and
      would drop all statistics but the last; the phase is unknown.
  """
  if phase not in (None, 'plain', 'refresh'):
    raise CurvatureError(f"phase={phase!r} is unknown; choose 'plain', 'refresh' or None")
  if not isinstance(stats, NotGiven):
    if stats is not None and _inside_multisteps():
      raise CurvatureError(
        'optax.MultiSteps hands over the statistics of the last microbatch alone; add gradients and statistics '
        '(kron.accumulate) up in the loop and call update once'
      )
    return stats
  if phase is None:
    raise CurvatureError(
      'update was given no stats=: pass those of value_and_grad, or stats=None for a step without; what hands over '
      "gradients alone (flax's TrainState.apply_gradients, optax.lookahead) makes plain descent of it: call update "
      'yourself'
    )
  return None


def _inside_multisteps() -> bool:
  """Tells whether optax.MultiSteps makes this call; only its stack frame shows that."""
  frame = sys._getframe(1)
  while frame is not None:
    if frame.f_code.co_name == 'update' and isinstance(frame.f_locals.get('self'), optax.MultiSteps):
      return True
    frame = frame.f_back
  return False


def when(due: Any, fn: Callable, state: Any) -> Any:
  if isinstance(due, bool):
    return fn(state) if due else state
  return jax.lax.cond(due, fn, lambda s: s, state)


def averaged(
  state: Any,
  stats: Statistics | None,
  phase: Phase | None,
  blocks: Sequence[Block],
  decay: optax.ScalarOrSchedule,
  every: Interval,
  placement: Placement,
) -> Averages:
  """Returns the state's averages with this step's statistics added, if there are any and they are due."""
  if stats is None:
    return state.averages
  due = is_due(state.count, every) if phase is None else True
  rate = at(decay, state.count)
  return when(due, lambda averages: averages.add(stats, blocks, rate, placement), state.averages)


def refreshed(
  state: ScaleByKfacState,
  layout: Layout,
  damping: Any,
  placement: Placement,
  only: Mapping[str, Bool[Array, 'o s']] | None = None,
) -> ScaleByKfacState:
  """Returns the state with new inverses in all slots, or in those that `only` selects."""
  means = state.averages.means()
  added = slot_damping(layout, means, jnp.asarray(damping), placement.replicate)
  old = placement.own(state.inverses, layout)
  renew = functools.partial(renewed, axes=placement.axes)
  inverses, counts = placement.over_stacks(renew)(means, added, state.averages.weights, old, only)
  return counted(state._replace(inverses=state.inverses.filled(placement.share(inverses, layout))), counts)


def counted(state: Any, counts: Int[Array, 'o 2']) -> Any:
  """Adds the counts from `renewed` to the counts of a state."""
  rejected, redamped = counts.sum(0, dtype=jnp.int32)
  return state._replace(
    rejected_inverses=state.rejected_inverses + rejected, redamped_inverses=state.redamped_inverses + redamped
  )


def renewed(
  means: Mapping[str, Float[Array, 'o s r n']],
  damping: Mapping[str, Float[Array, 'o s']],
  weights: Mapping[str, Float[Array, 'o s']],
  old: Mapping[str, Float[Array, 'o s r n']],
  only: Mapping[str, Bool[Array, 'o s']] | None,
  axes: tuple[str, ...],
) -> tuple[dict[str, Float[Array, 'o s r n']], Int[Array, 'o 2']]:
  """Returns damped inverses, the number of dropped ones, and the number of those that needed more damping.

  A slot keeps its old inverse if the new one is not finite or if its factor has no statistics. If a matrix cannot be
  inverted, it is tried again with ten times the damping, up to 10^4 times the damping. A matrix that is split over
  owners is not tried again.
  """

  def renew(x, damping, weights, old, wanted):
    split = x.shape[-2] < x.shape[-1]
    known = (weights > 0) & wanted
    if split:  # every owner has a part of it, and one of them counts
      new = split_inverse(x, damping, axes)
      failed = known & (jax.lax.psum((~jnp.isfinite(new).all((-1, -2))).astype(jnp.int32), axes) > 0)
      new = jnp.where((known & ~failed)[..., None, None], new, old)
      failed, more = failed & (jax.lax.axis_index(axes) == 0), jnp.zeros_like(failed)
    else:
      new, failed, more = sure_inverse(x, damping, known, old)
    return new, jnp.stack([failed.sum(1, dtype=jnp.int32), more.sum(1, dtype=jnp.int32)], -1)

  def keep(x, damping, weights, old, wanted):
    return old, jnp.zeros((len(weights), 2), jnp.int32)

  inverses, counts = {}, []
  for stack, x in means.items():
    arrays = x, damping[stack], weights[stack], old[stack]
    if only is None:
      inverses[stack], n = renew(*arrays, True)
    else:
      inverses[stack], n = jax.lax.cond(only[stack].any(), renew, keep, *arrays, only[stack])
    counts.append(n)
  return inverses, sum(counts)


def apply_inverses(
  updates: Any, inverses: Mapping[str, Array], curvature: Curvature, layout: Layout, placement: Placement
) -> Any:
  """Multiplies the gradient tree by the inverse of every block."""
  blocks, tree = curvature.blocks, match(updates, curvature.parameters)
  if layout.local_inverses:
    product = precondition_at_owners(inverses, blocks, layout, placement)
    return tree.rebuilt(on_matrices(tree.leaves, blocks, placement, product))
  of_block = {b.name: {f: layout.read(inverses, b.name, f) for f in b.operator.factors} for b in blocks}
  return tree.rebuilt(
    by_block(tree.leaves, blocks, placement, lambda b, v: b.operator.precondition(v, of_block[b.name]))
  )


def by_block(
  leaves: Mapping[str, Array],
  blocks: Sequence[Block],
  placement: Placement,
  fn: Callable[[Block, Array], Array],
  otherwise: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
  """Applies `fn` to the gradient matrix of every block; other parameters stay, or are taken from `otherwise`."""

  def one_by_one(matrices: Mapping[str, Array]) -> dict[str, Array]:
    return {b.name: fn(b, matrices[b.name]) for b in blocks if b.name in matrices}

  return on_matrices(leaves, blocks, placement, one_by_one, otherwise)


def on_matrices(
  leaves: Mapping[str, Array],
  blocks: Sequence[Block],
  placement: Placement,
  fn: Callable[[Mapping[str, Array]], dict[str, Array]],
  otherwise: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
  """Applies `fn` to the gradient matrices of all blocks at once, by block name; otherwise like `by_block`.

  Args:
    leaves: gradients by the names of their parameters, from `match`; masked ones are not among them.
  """
  result = dict(leaves if otherwise is None else otherwise)
  matrices = {}
  for block in blocks:
    present = [name for name in block.params if name in leaves]
    if not present:
      continue  # masked: another transformation handles it
    if len(present) < len(block.params):
      missing = next(name for name in block.params if name not in leaves)
      raise CurvatureError(f'{missing!r} shares a block with {present[0]!r} but is not among the gradients; give both')
    # Replicate the matrices, like the inverses. This costs one gather; products of shards cost several collectives.
    matrices[block.name] = block.operator.to_matrix(*placement.replicate([leaves[name] for name in block.params]))
  products = fn(matrices)
  for block in (b for b in blocks if b.name in matrices):
    u = placement.replicate(block.operator.from_matrix(products[block.name]))
    ones = jnp.ones_like(matrices[block.name])
    mine = block.operator.from_matrix(ones) if block.partial else [None] * len(u)
    for name, new, mask in zip(block.params, u, mine, strict=True):
      new = new.astype(leaves[name].dtype)
      # A piece of a parameter changes its entries alone; entries that no piece holds stay as they are.
      result[name] = new if mask is None else jnp.where(mask != 0, new, result[name])
  return result


def factors(state: Any) -> dict[str, dict[str, Float[Array, 'slots n n']]]:
  """Returns the debiased, unpadded factors of an optimiser state, by block and factor.

  A block has the name of its first parameter.

  Args:
    state: any optax state that contains averages of factors exactly once.

  Returns:
    block -> factor ('A', 'G' or 'F') -> the average, (slots, n, n).

  Raises:
    CurvatureError: there are no averages in the state, or several.
  """
  averages = find_state(state, Averages)
  return averages.factors.filled(averages.means()).by_block()


def find_state(state: Any, kind: type = ScaleByKfacState) -> Any:
  """Returns the only state of a kind inside an optax state.

  Args:
    state: any optax state, or any pytree.
    kind: the type to look for.

  Raises:
    CurvatureError: there is no state of this kind, or there are several.
  """
  is_state = lambda x: isinstance(x, kind)  # noqa: E731
  states = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
  if len(states) != 1:
    raise CurvatureError(f'the optimiser state holds {len(states)} of {kind.__name__}; expected one')
  # flax's nnx.Optimizer keeps each array of the state in a variable.
  return jax.tree.map(lambda x: x[...] if _is_variable(x) else x, states[0], is_leaf=_is_variable)


def _is_variable(x: Any) -> bool:
  return hasattr(x, 'get_value') and hasattr(x, 'get_metadata')


def replace_state(state: Any, new: ScaleByKfacState) -> Any:
  """Returns an optax state with `new` in place of the only state of its kind.

  Args:
    state: an optax state that contains a state of the type of `new`. If there is none, it is returned unchanged.
    new: the new state.
  """
  is_state = lambda x: isinstance(x, type(new))  # noqa: E731
  return jax.tree.map(lambda x: new if is_state(x) else x, state, is_leaf=is_state)
