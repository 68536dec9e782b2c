"""The programs of a training step, and the choice of those that a step runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import kron
from . import guard, loss_scale, microbatches, recipe
from .optimizers import SECOND_ORDER, gradients
from .players import ONLY, Game, Player, part, with_part
from .task import Task

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that a run needs to resume, beside the config and the data's position. Trees of several players are dicts."""

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  key: jax.Array
  guard: guard.Guard
  average: Any = ()  # the moving average of the parameters
  mixed: Any = ()  # the last mixed batch of a running mixup


class Plan(NamedTuple):
  """The parts from which the programs of a run are made.

  inverse_schedule: renews the factors and inverses of the only player's K-FAC, the latter between gradient and update.
  mixed: (batch, last mixed batch, key) -> (batch, mixed batch).
  around: wraps the only player's gradient, see `gradient_allreduce.by_shard`.
  shardings: the shardings of the state.
  batch_sharding: the shardings of a training batch's arrays, by name; any other array has that of the label.
  """

  config: Any
  task: Task
  players: Mapping[str, Player]
  game: Game | None
  inverse_schedule: kron.InverseSchedule | None
  mixed: Callable
  around: Callable
  shardings: TrainState
  batch_sharding: Any


class Move(NamedTuple):
  """The inputs of a player's gradient."""

  player: Player
  context: Any
  batch: Batch
  key: jax.Array
  statistics: bool
  refresh: bool


class Gradient(NamedTuple):
  """The results of a move: metrics, the network's new state, the gradient, and what else the update takes."""

  metrics: Metrics
  model_state: Any
  grads: Any
  extra: dict[str, Any]


def make_steps(plan: Plan) -> tuple[dict[str, Callable], Callable, Callable]:
  """Returns `programs`, `step` and `evaluate` of a `Run`."""
  replicated, shardings, inverse_schedule = plan.shardings.step, plan.shardings, plan.inverse_schedule
  inside = (shardings, plan.batch_sharding)
  compiled = functools.partial(jax.jit, donate_argnums=0)
  if inverse_schedule is None:
    take = functools.partial(whole_step, plan)
    out = (shardings, replicated)
    programs = {'step': compiled(take, in_shardings=inside, out_shardings=out, static_argnums=(2, 3))}
    step = functools.partial(_step_at_once, plan, programs['step'])
  else:
    first, second = functools.partial(gradient, plan), functools.partial(_update, plan)
    out = (shardings, shardings.params, replicated)
    programs = {
      'gradient': compiled(first, in_shardings=inside, out_shardings=out, static_argnums=2),
      'update': compiled(second, in_shardings=(shardings, shardings.params), out_shardings=(shardings, replicated)),
    }
    step = functools.partial(_step_in_two, plan, programs)
  evaluate = functools.partial(_evaluate, plan) if plan.game is None else plan.game.evaluate
  return programs, step, jax.jit(evaluate, in_shardings=(shardings, None), out_shardings=replicated)


def _step_at_once(plan: Plan, program: Callable, state: TrainState, batch: Batch, number: int):
  leading = next((p.config for p in reversed(plan.players.values()) if p.curvature is not None), plan.config)
  return program(state, batch, *phase(leading, number))


def _step_in_two(plan: Plan, programs: dict[str, Callable], state: TrainState, batch: Batch, number: int):
  """Runs the gradient's program, refreshes the inverses that are due, and runs the update's program."""
  schedule, faults = plan.inverse_schedule, plan.config.faults
  state, grads, metrics = programs['gradient'](state, batch, schedule.statistics_due(number))
  careful = {'caution': state.guard.caution} if 'damp' in (faults.not_finite, faults.spike) else {}
  state = state._replace(opt_state=schedule.refresh(state.opt_state, number, when=state.guard.apply, **careful))
  state, health = programs['update'](state, grads)
  return state, {**metrics, **health}


def whole_step(
  plan: Plan, state: TrainState, batch: Batch, statistics: bool, refresh: bool
) -> tuple[TrainState, Metrics]:
  """Takes all moves of a step, with an update after each. A step that is not sound changes nothing."""
  key, finite = jax.random.fold_in(state.key, state.step), jnp.isfinite(batch['inputs']).all()
  if plan.game is None:
    gradient, mixture = _mixed_gradient(plan, state, batch, key, statistics, refresh)
    new = _moved(plan, state._replace(mixed=mixture), plan.players[ONLY], gradient)
    metrics, grads, total = gradient.metrics, gradient.grads, gradient.metrics['loss']
  else:
    new, metrics, grads = _play(plan, state, batch, key, statistics, refresh)
    total = plan.game.total(metrics)
  judged, metrics = _judged(plan, state, metrics, grads, total, finite)
  new = guard.chosen(judged.apply, _averaged(plan, new, state), state)
  return _ended(new._replace(guard=judged)), {**metrics, **_health(plan, new.opt_state)}


def gradient(plan: Plan, state: TrainState, batch: Batch, statistics: bool) -> tuple[TrainState, Any, Metrics]:
  """Returns the state with everything changed but its update, the only player's gradient, and metrics."""
  key, finite = jax.random.fold_in(state.key, state.step), jnp.isfinite(batch['inputs']).all()
  gradient, mixture = _mixed_gradient(plan, state, batch, key, statistics, False)
  judged, metrics = _judged(plan, state, gradient.metrics, gradient.grads, gradient.metrics['loss'], finite)
  keep = functools.partial(guard.chosen, judged.apply)
  opt_state = state.opt_state
  if statistics:
    opt_state = keep(plan.inverse_schedule.take(opt_state, gradient.extra['stats']), opt_state)
  state = state._replace(
    model_state=keep(gradient.model_state, state.model_state),
    mixed=keep(mixture, state.mixed),
    opt_state=opt_state,
    guard=judged,
  )
  return state, gradient.grads, metrics


def _update(plan: Plan, state: TrainState, grads: Any) -> tuple[TrainState, Metrics]:
  """Applies the only player's update, if the last gradient is sound."""
  gradient = Gradient({}, state.model_state, grads, {'phase': 'plain'})
  new = _averaged(plan, _moved(plan, state, plan.players[ONLY], gradient), state)
  new = guard.chosen(state.guard.apply, new, state)
  return _ended(new), _health(plan, new.opt_state)


def _mixed_gradient(
  plan: Plan, state: TrainState, batch: Batch, key: jax.Array, statistics: bool, refresh: bool
) -> tuple[Gradient, Any]:
  """Computes the only player's gradient on the mixed batch, over microbatches; also returns the mixed batch."""
  config, player = plan.config, plan.players[ONLY]
  batch, mixture = plan.mixed(batch, state.mixed, key)

  def one(model_state: Any, batch: Batch, key: jax.Array) -> Gradient:
    context = loss_scale.carried(config, model_state, state.guard.scale)
    return _gradient(plan, state, Move(player, context, batch, key, statistics, refresh))

  if config.microbatches == 1:
    return one(state.model_state, batch, key), mixture

  def numbered(model_state: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, tuple]:
    number, part = part
    gradient = one(model_state, part, jax.random.fold_in(key, number))
    return gradient.model_state, (gradient.metrics, gradient.grads, gradient.extra.get('stats'))

  parts = microbatches.divide(batch, config.microbatches, plan.batch_sharding)
  added = microbatches.add_up(numbered, state.model_state, parts, config.microbatches)
  model_state, (metrics, grads, stats) = added
  extra = {} if player.curvature is None else {'stats': stats, 'phase': 'refresh' if refresh else 'plain'}
  return Gradient(metrics, model_state, grads, extra), mixture


def _play(
  plan: Plan, state: TrainState, batch: Batch, key: jax.Array, statistics: bool, refresh: bool
) -> tuple[TrainState, Metrics, dict[str, Any]]:
  """Plays all moves of a game; returns the state after them, their metrics, and each player's last gradient."""
  game = plan.game
  parts = microbatches.divide(batch, game.parts, plan.batch_sharding)
  metrics: Metrics = {}
  grads: dict[str, Any] = {}
  for number, name in enumerate(game.turns):
    batch_part = jax.tree.map(lambda x, number=number: x[number % game.parts], parts)
    draw, mark, other = jax.random.split(jax.random.fold_in(key, number), 3)
    context, full = game.deal(name, state.params, state.model_state, batch_part, draw, mark)
    first = name not in grads  # factors are renewed only at a player's first move
    move = Move(plan.players[name], context, full, other, statistics and first, refresh and first)
    gradient = _gradient(plan, state, move)
    more = game.added(name, state.params, state.model_state, full)
    if more is not None:
      summed = jax.tree.map(jnp.add, gradient.grads, more)
      lying = part(plan.shardings.params, name)
      gradient = gradient._replace(grads=jax.lax.with_sharding_constraint(summed, lying))
    state = _moved(plan, state, plan.players[name], gradient)
    grads[name] = gradient.grads
    metrics |= gradient.metrics
  return state, metrics, {name: grads[name] for name in game.names}


def _gradient(plan: Plan, state: TrainState, move: Move) -> Gradient:
  """Computes one player's gradient on one batch."""
  player, config = move.player, plan.config
  args = (part(state.params, player.name), move.context, move.batch)
  extra: dict[str, Any] = {}
  if player.curvature is not None:
    at = {'statistics': move.statistics, 'refresh': move.refresh, 'around': plan.around}
    opt_state = part(state.opt_state, player.name)
    (_, aux), grads, extra = gradients(player, args, opt_state, move.key, **at)
  else:

    def plain(params: Any, context: Any, batch: Batch, key: jax.Array) -> tuple:
      return *jax.value_and_grad(player.loss, has_aux=True)(params, context, batch), None

    (_, aux), grads, _ = plan.around(plain)(*args, move.key)
  if config.recipe.loss_scale:
    grads, extra = loss_scale.unscaled(grads, extra, state.guard.scale, player.curvature)
  # Otherwise XLA may compute whole gradients on every device, as K-FAC needs later, and reduce more than it should.
  grads = jax.lax.with_sharding_constraint(grads, part(plan.shardings.params, player.name))
  metrics, model_state = aux
  return Gradient(metrics, model_state, grads, extra)


def _moved(plan: Plan, state: TrainState, player: Player, gradient: Gradient) -> TrainState:
  """Returns the state after a player's update."""
  params, opt_state = part(state.params, player.name), part(state.opt_state, player.name)
  updates, opt_state = player.tx.update(gradient.grads, opt_state, params, **gradient.extra)
  return state._replace(
    params=with_part(state.params, player.name, optax.apply_updates(params, updates)),
    model_state=with_part(state.model_state, player.name, gradient.model_state),
    opt_state=with_part(state.opt_state, player.name, opt_state),
  )


def _judged(
  plan: Plan, state: TrainState, metrics: Metrics, grads: Any, total: jax.Array, finite: jax.Array
) -> tuple[guard.Guard, Metrics]:
  """Judges whether a step is sound, and adds to its metrics what the judgement rests on."""
  norms = guard.norms(grads)
  judged = guard.assess(plan.config, state.guard, total, norms, finite)
  metrics = {**metrics, 'finite_input': finite, 'held': judged.held, 'gradient_norms': norms}
  if plan.config.recipe.loss_scale:
    metrics |= {'loss_scale': judged.scale, 'overflows': judged.overflows}
  return judged, metrics


def _averaged(plan: Plan, new: TrainState, before: TrainState) -> TrainState:
  """Adds the parameters to the moving average of the state, if the config has one."""
  decay = plan.config.recipe.average
  if not decay:
    return new
  return new._replace(average=recipe.averaged(before.average, new.params, before.step, decay))


def _ended(state: TrainState) -> TrainState:
  return state._replace(step=state.step + jnp.where(state.guard.held, 0, 1))


def _evaluate(plan: Plan, state: TrainState, batch: Batch) -> Metrics:
  params = state.average if plan.config.recipe.average else state.params
  metrics = plan.task.loss(params, state.model_state, batch, train=False)[1][0]
  return {**metrics, 'examples': batch['mask'].sum()}


def phase(config: Any, step: int) -> tuple[bool, bool]:
  """Returns whether a second-order optimiser takes statistics at this step, and whether it refreshes its inverses."""
  if config.optimizer not in SECOND_ORDER:
    return False, False
  settings = config[config.optimizer]
  return tuple(step % kron.growing(settings[name])(step) == 0 for name in ('statistics_every', 'inverses_every'))


def _health(plan: Plan, opt_state: Any) -> Metrics:
  """Returns what the only player's optimiser reports: the clip, what it chose, and what was not finite."""
  if plan.game is not None:
    return {}
  names = (
    'clip',
    'rejected_statistics',
    'rejected_inverses',
    'redamped_inverses',
    'refreshes_saved',
    'damping',
    'learning_rate',
    'momentum',
  )
  numbers = {name: optax.tree_utils.tree_get(opt_state, name) for name in names}
  return {name: value for name, value in numbers.items() if value is not None}
