"""The programs of a training step, and which of them a step runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import guard, recipe
from experiments.optimizers import SECOND_ORDER, gradients
from experiments.task import Task
from kronmesh import kron

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that a run needs to go on, beside the config and the data's position."""

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  key: jax.Array
  guard: guard.Guard
  average: Any = ()  # of the parameters
  mixed: Any = ()  # the last batch of a running mixup


def make_steps(
  config: Any,
  task: Task,
  curvature: kron.Curvature | None,
  tx: optax.GradientTransformationExtraArgs,
  upkeep: kron.Upkeep | None,
  *,
  mixed: Callable,
  around: Callable,
  shardings: TrainState,
  batch_sharding: Any,
) -> tuple[dict[str, Callable], Callable, Callable]:
  """`programs`, `step` and `evaluate` of a `Run`.

  Args:
    config, task, curvature, tx, upkeep: what is trained, and by what.
    mixed: (batch, last mixed batch, key) -> (batch, mixed batch).
    around: goes around the gradient, see `reduce.by_shard`.
    shardings: of the state.
    batch_sharding: of the arrays of a training batch, by name; any other lies as the label does.
  """
  replicated = shardings.step
  loss = recipe.scaled(config, task.loss)

  def one_gradient(
    state: TrainState, model_state: Any, batch: Any, key: jax.Array, statistics: bool, refresh: bool
  ) -> tuple[Metrics, Any, Any, dict[str, Any]]:
    """Metrics, the model's new state, gradients, and what the update takes beside them."""
    args = (state.params, recipe.carried(config, model_state, state.guard.scale), batch)
    extra: dict[str, Any] = {}
    if curvature is not None:
      at = {'statistics': statistics, 'refresh': refresh, 'around': around}
      (_, aux), grads, extra = gradients(config, curvature, loss, args, state.opt_state, key, **at)
    else:
      plain = lambda params, model_state, batch, key: (  # noqa: E731
        *jax.value_and_grad(loss, has_aux=True)(params, model_state, batch),
        None,
      )
      (_, aux), grads, _ = around(plain)(*args, key)
    if config.recipe.loss_scale:
      grads, extra = recipe.unscaled(grads, extra, state.guard.scale, curvature)
    # Else XLA may compute them whole on every device, as K-FAC needs them later, and reduce more than there is.
    grads = jax.lax.with_sharding_constraint(grads, shardings.params)
    metrics, model_state = aux
    return metrics, model_state, grads, extra

  def differentiate(
    state: TrainState, batch: dict[str, jax.Array], statistics: bool, refresh: bool
  ) -> tuple[TrainState, Any, Metrics, dict[str, Any]]:
    """The state but for its parameters, gradients, metrics, and what the update takes beside them."""
    key = jax.random.fold_in(state.key, state.step)
    finite = jnp.isfinite(batch['image']).all()
    batch, mixture = mixed(batch, state.mixed, key)
    if config.microbatches == 1:
      metrics, model_state, grads, extra = one_gradient(state, state.model_state, batch, key, statistics, refresh)
    else:
      parts = recipe.microbatches(batch, config.microbatches, batch_sharding)

      def one(model_state, part):
        number, part = part
        own = jax.random.fold_in(key, number)
        metrics, model_state, grads, extra = one_gradient(state, model_state, part, own, statistics, refresh)
        return model_state, (metrics, grads, extra.get('stats'))

      model_state, (metrics, grads, stats) = recipe.added_up(one, state.model_state, parts, config.microbatches)
      extra = {} if curvature is None else {'stats': stats, 'phase': 'refresh' if refresh else 'plain'}
    norms = guard.norms(grads)
    judged = guard.judge(config, state.guard, metrics['loss'], norms, finite)
    keep = functools.partial(guard.chosen, judged.apply)
    state = state._replace(
      model_state=keep(model_state, state.model_state), mixed=keep(mixture, state.mixed), guard=judged
    )
    metrics = {**metrics, 'finite_input': finite, 'held': judged.held, 'gradient_norms': norms}
    if config.recipe.loss_scale:
      metrics |= {'loss_scale': judged.scale, 'overflows': judged.overflows}
    return state, grads, metrics, extra

  def descend(state: TrainState, grads: Any, **extra: Any) -> tuple[TrainState, Metrics]:
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(params=params, opt_state=opt_state)
    if config.recipe.average:
      new = new._replace(average=recipe.averaged(state.average, params, state.step, config.recipe.average))
    new = guard.chosen(state.guard.apply, new, state)
    step = state.step + jnp.where(state.guard.held, 0, 1)
    return new._replace(step=step), _health(new.opt_state)

  def whole_step(
    state: TrainState, batch: dict[str, jax.Array], statistics: bool, refresh: bool
  ) -> tuple[TrainState, Metrics]:
    state, grads, metrics, extra = differentiate(state, batch, statistics, refresh)
    state, health = descend(state, grads, **extra)
    return state, {**metrics, **health}

  def gradient(state: TrainState, batch: dict[str, jax.Array], statistics: bool) -> tuple[TrainState, Any, Metrics]:
    before = state.opt_state
    state, grads, metrics, extra = differentiate(state, batch, statistics, False)
    if statistics:
      taken = upkeep.take(before, extra['stats'])
      state = state._replace(opt_state=guard.chosen(state.guard.apply, taken, before))
    return state, grads, metrics

  compiled = functools.partial(jax.jit, donate_argnums=0)
  if upkeep is None:
    programs = {
      'step': compiled(
        whole_step,
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, replicated),
        static_argnums=(2, 3),
      )
    }
  else:
    programs = {
      'gradient': compiled(
        gradient,
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, shardings.params, replicated),
        static_argnums=2,
      ),
      'update': compiled(
        functools.partial(descend, phase='plain'),
        in_shardings=(shardings, shardings.params),
        out_shardings=(shardings, replicated),
      ),
    }

  def step(state: TrainState, batch: dict[str, jax.Array], number: int) -> tuple[TrainState, Metrics]:
    if upkeep is None:
      return programs['step'](state, batch, *phase(config, number))
    state, grads, metrics = programs['gradient'](state, batch, upkeep.statistics_due(number))
    careful = {} if 'damp' not in (config.faults.not_finite, config.faults.spike) else {'caution': state.guard.caution}
    state = state._replace(opt_state=upkeep.refresh(state.opt_state, number, when=state.guard.apply, **careful))
    state, health = programs['update'](state, grads)
    return state, {**metrics, **health}

  def evaluate(state: TrainState, batch: dict[str, jax.Array]) -> Metrics:
    params = state.average if config.recipe.average else state.params
    metrics = task.loss(params, state.model_state, batch, train=False)[1][0]
    return {**metrics, 'examples': batch['mask'].sum()}

  return programs, step, jax.jit(evaluate, in_shardings=(shardings, None), out_shardings=replicated)


def phase(config: Any, step: int) -> tuple[bool, bool]:
  """Whether a second-order optimiser takes statistics at this step, and whether it refreshes its inverses."""
  if config.optimizer not in SECOND_ORDER:
    return False, False
  own = config[config.optimizer]
  return tuple(step % kron.growing(own[name])(step) == 0 for name in ('statistics_every', 'inverses_every'))


def _health(opt_state: Any) -> Metrics:
  """What an optimiser reports of itself: the clip, what it chose, refreshes saved, matrices that were not finite."""
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
  found = {name: optax.tree_utils.tree_get(opt_state, name) for name in names}
  return {name: value for name, value in found.items() if value is not None}
