"""Trains one config: mesh, data, model, state, step, loop.

python experiments/train.py --config=experiments/configs/digits.py --config.optimizer=adam --workdir=runs/adam

Without --config it trains digits.py.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.launch import launch  # isort: skip  (sets the environment before JAX loads)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import processes, recipe, reduce
from experiments.checkpoints import open_checkpoints, restore, save
from experiments.errors import ConfigError, RunError
from experiments.inputs import make_data
from experiments.optimizers import SECOND_ORDER, gradients, make_optimizer, make_upkeep
from experiments.progress import Progress
from experiments.tasks import Task, make_task
from kronmesh import kron, parallel


class TrainState(NamedTuple):
  """All that a run needs to go on, beside the config; the data's position is the step."""

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  key: jax.Array
  mixed: Any = ()  # the last batch of a running mixup


class Run(NamedTuple):
  """A config made real on a mesh.

  step: (state, batch, number) -> (state, metrics), by the programs below that the number asks for.
  programs: what is compiled: 'step' of (state, batch, statistics, refresh), the last two static; with an upkeep 'gradient'
    of (state, batch, statistics) and 'update' of (state, gradients) in its place.
  upkeep: of K-FAC's factors and inverses, between the two; None for other optimisers.
  evaluate: (state, batch) -> metrics.
  """

  config: Any
  task: Task
  mesh: Mesh
  curvature: kron.Curvature | None
  placement: kron.Placement
  shardings: TrainState
  init: Callable[[int], TrainState]  # of the seed
  step: Callable
  programs: dict[str, Callable]
  upkeep: kron.Upkeep | None
  evaluate: Callable
  train_batches: Callable[[int, int], Iterator[dict[str, Any]]]  # of the seed and the first step
  eval_batches: Callable[[], Iterator[dict[str, Any]]]


def build(config: Any) -> Run:
  """Makes mesh, data, model, shardings and compiled functions; everything that can be wrong with a config shows here."""
  _check(config)
  mesh = parallel.make_mesh(config.mesh)
  task = make_task(config)
  own_collectives = reduce.check(config, mesh)
  rules = parallel.RULES[config.model.name]
  task = task._replace(loss=task.loss if own_collectives else on_mesh(task.loss, rules, mesh))
  train_batches, eval_batches = make_data(config, mesh)
  batch_sharding = parallel.batch_sharding(mesh, config.data.batch_size)

  image = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(train_batches(0, 0)))
  pixels = image['image']
  boxed = jax.eval_shape(lambda: task.model.init(jax.random.key(0), jnp.zeros(pixels.shape, pixels.dtype), train=False))
  logical = nn.get_partition_spec(boxed)['params']
  variables = nn.meta.unbox(boxed)
  params = variables.pop('params')
  mixed = functools.partial(
    recipe.mix,
    alpha=config.recipe.mixup,
    running=config.recipe.running_mixup,
    classes=config.model.get('classes', 0),
  )
  settings = dict(config.placement)
  in_blocks = settings.pop('blocks')
  placement = spread = parallel.Placement(mesh, **settings).check()
  if mesh.size == 1:  # nothing to pack, and nowhere to send it
    placement, spread = kron.Local(), None
  param_shardings = parallel.param_shardings(params, logical, rules, mesh)
  curvature = None
  if config.optimizer in SECOND_ORDER:
    fisher = config[config.optimizer].fisher
    seen = jax.eval_shape(lambda b: mixed(b, recipe.nothing_mixed(config, pixels), jax.random.key(0))[0], image)
    if own_collectives:  # what one shard sees
      seen = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // mesh.size, *x.shape[1:]), x.dtype), seen)
    where = {} if own_collectives else {'placement': placement}
    where['blocks'] = parallel.shard_blocks(param_shardings) if in_blocks else None
    where['part'] = config[config.optimizer].part
    curvature = kron.curvature(task.loss, params, variables, seen, fisher=fisher, has_aux=True, **where)
  tx = optax.with_extra_args_support(make_optimizer(config, curvature, placement))
  upkeep = make_upkeep(config, curvature, placement)

  def init(seed: int) -> TrainState:
    key = jax.random.key(seed)
    variables = nn.meta.unbox(task.model.init(key, jnp.zeros(pixels.shape, pixels.dtype), train=False))
    params = variables.pop('params')
    mixed = recipe.nothing_mixed(config, pixels)
    return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params), jax.random.fold_in(key, 1), mixed)

  around = functools.partial(reduce.by_shard, config=config, mesh=mesh) if own_collectives else lambda fn: fn
  like = jax.eval_shape(init, 0)
  replicated = parallel.replicated(mesh)
  shardings = TrainState(
    step=replicated,
    params=param_shardings,
    model_state=jax.tree.map(lambda _: replicated, like.model_state),
    opt_state=parallel.state_shardings(like.opt_state, param_shardings, mesh, placement=spread),
    key=replicated,
    mixed=jax.tree.map(lambda _: batch_sharding, like.mixed),
  )

  def differentiate(
    state: TrainState, batch: dict[str, jax.Array], statistics: bool, refresh: bool
  ) -> tuple[TrainState, Any, dict[str, jax.Array], dict[str, Any]]:
    """The state but for its parameters, gradients, metrics, and what the update takes beside them."""
    key = jax.random.fold_in(state.key, state.step)
    finite = jnp.isfinite(batch['image']).all()
    batch, mixture = mixed(batch, state.mixed, key)
    args = (state.params, state.model_state, batch)
    extra: dict[str, Any] = {}
    if curvature is not None:
      at = {'statistics': statistics, 'refresh': refresh, 'around': around}
      (_, aux), grads, extra = gradients(config, curvature, task.loss, args, state.opt_state, key, **at)
    else:
      plain = lambda params, model_state, batch, key: (  # noqa: E731
        *jax.value_and_grad(task.loss, has_aux=True)(params, model_state, batch),
        None,
      )
      (_, aux), grads, _ = around(plain)(*args, key)
    metrics, model_state = aux
    # Else XLA may compute them whole on every device, as K-FAC needs them later, and reduce more than there is.
    grads = jax.lax.with_sharding_constraint(grads, shardings.params)
    return state._replace(model_state=model_state, mixed=mixture), grads, {**metrics, 'finite_input': finite}, extra

  def descend(state: TrainState, grads: Any, **extra) -> tuple[TrainState, dict[str, jax.Array]]:
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), _health(opt_state)

  def whole_step(
    state: TrainState, batch: dict[str, jax.Array], statistics: bool, refresh: bool
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    state, grads, metrics, extra = differentiate(state, batch, statistics, refresh)
    state, health = descend(state, grads, **extra)
    return state, {**metrics, **health}

  def gradient(
    state: TrainState, batch: dict[str, jax.Array], statistics: bool
  ) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    state, grads, metrics, extra = differentiate(state, batch, statistics, False)
    if statistics:
      state = state._replace(opt_state=upkeep.take(state.opt_state, extra['stats']))
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

  def step(state: TrainState, batch: dict[str, jax.Array], number: int) -> tuple[TrainState, dict[str, jax.Array]]:
    if upkeep is None:
      return programs['step'](state, batch, *phase(config, number))
    state, grads, metrics = programs['gradient'](state, batch, upkeep.statistics_due(number))
    state = state._replace(opt_state=upkeep.refresh(state.opt_state, number))
    state, health = programs['update'](state, grads)
    return state, {**metrics, **health}

  def evaluate(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    metrics = task.loss(state.params, state.model_state, batch, train=False)[1][0]
    return {**metrics, 'examples': batch['mask'].sum()}

  return Run(
    config=config,
    task=task,
    mesh=mesh,
    curvature=curvature,
    placement=placement,
    shardings=shardings,
    init=jax.jit(init, out_shardings=shardings),
    step=step,
    programs=programs,
    upkeep=upkeep,
    evaluate=jax.jit(evaluate, in_shardings=(shardings, batch_sharding), out_shardings=replicated),
    train_batches=train_batches,
    eval_batches=eval_batches,
  )


def on_mesh(loss: Callable, rules: parallel.Rules, mesh: Mesh) -> Callable:
  """The loss with its activations sharded."""

  @functools.wraps(loss)
  def sharded(*args, **kwargs):
    with parallel.logical_axes(rules, mesh):
      return loss(*args, **kwargs)

  return sharded


def _check(config: Any) -> None:
  counts = {name: config[name] for name in ('steps', 'eval_every', 'log_every')}
  if config.stop_at_target:
    check_target(config)
  if config.optimizer in SECOND_ORDER:
    own = config[config.optimizer]
    counts |= {f'{config.optimizer}.{name}': own[name] for name in ('statistics_every', 'inverses_every')}
  for name, value in counts.items():
    if value < 1:
      raise ConfigError(f'config.{name}={value} must be at least 1')


def _health(opt_state: Any) -> dict[str, jax.Array]:
  """What an optimiser reports of itself: the clip, what it chose, refreshes saved, matrices that were not finite."""
  names = (
    'clip',
    'rejected_statistics',
    'rejected_inverses',
    'refreshes_saved',
    'damping',
    'learning_rate',
    'momentum',
  )
  found = {name: optax.tree_utils.tree_get(opt_state, name) for name in names}
  return {name: value for name, value in found.items() if value is not None}


def evaluate_all(run: Run, state: TrainState) -> dict[str, float]:
  """Means of the metrics over one pass of the evaluation set."""
  parts = jax.device_get([run.evaluate(state, batch) for batch in run.eval_batches()])
  counts = [part.pop('examples') for part in parts]
  return {name: float(np.average([part[name] for part in parts], weights=counts)) for name in parts[0]}


def check_target(config: Any) -> None:
  """Raises ConfigError if the config has no target."""
  if not config.target:
    raise ConfigError('set config.target: the value of the metric that is to be reached')


def first_at(target: float, task: Task, rows: list[dict[str, float]]) -> dict[str, float] | None:
  """The first evaluation at which the task's metric reached the target."""
  key, sign = f'eval_{task.target}', 1 if task.lower_is_better else -1
  return next((row for row in rows if sign * row[key] <= sign * target), None)


def phase(config: Any, step: int) -> tuple[bool, bool]:
  """Whether a second-order optimiser takes statistics at this step, and whether it refreshes its inverses."""
  if config.optimizer not in SECOND_ORDER:
    return False, False
  own = config[config.optimizer]
  return tuple(step % kron.growing(own[name])(step) == 0 for name in ('statistics_every', 'inverses_every'))


def train(config: Any, workdir: str | Path, quiet: bool = False, run: Run | None = None) -> list[dict[str, float]]:
  """Trains, from the newest checkpoint in the work folder if there is one.

  Writes `metrics.jsonl`, `config.json`, `coverage.txt` (K-FAC) and `checkpoints/` there.

  Args:
    config: see experiments/configs/defaults.py.
    workdir: the run's folder.
    quiet: no progress.
    run: one built before from a config that differs in its seed at most.

  Returns:
    The rows of `metrics.jsonl` that carry an evaluation, those before a resumption included.

  Raises:
    ConfigError, parallel.MeshError, data.DataError, kron.CurvatureError: a config that cannot be run.
    RunError: the loss or a batch is not finite.
  """
  workdir = Path(workdir).absolute()
  run = build(config) if run is None else run._replace(config=config)
  chief = processes.chief()  # writes what all share
  if chief:
    workdir.mkdir(parents=True, exist_ok=True)
    _check_same_config(config, workdir / 'config.json')
    if run.curvature is not None:
      (workdir / 'coverage.txt').write_text(f'{run.curvature}\n')
  with open_checkpoints(workdir, config.keep_checkpoints or None) as checkpoints:
    state = restore(run, checkpoints)
    start = int(state.step)
    if chief:
      _drop_rows_after(workdir / 'metrics.jsonl', start)
    if not processes.agree(chief and arrived(run, evaluations(workdir))):
      _loop(run, state, start, workdir, checkpoints, quiet or not chief)
  return evaluations(workdir) if chief else []


def evaluations(workdir: Path) -> list[dict[str, float]]:
  """The rows of a run's `metrics.jsonl` that carry an evaluation; none where there is no run."""
  log = workdir / 'metrics.jsonl'
  rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
  return [row for row in rows if 'seconds' in row]


def arrived(run: Run, rows: list[dict[str, float]]) -> bool:
  """Whether a run that is to stop at its target has reached it."""
  return run.config.stop_at_target and first_at(run.config.target, run.task, rows) is not None


def _loop(run: Run, state: TrainState, start: int, workdir: Path, checkpoints: Any, quiet: bool) -> None:
  config = run.config
  batches = run.train_batches(config.seed, start)
  chief = processes.chief()
  before = evaluations(workdir) if chief else []
  pending, clock, trained = [], time.perf_counter(), before[-1]['seconds'] if before else 0.0
  title = f'{config.optimizer} on {config.data.name}'
  with (
    Progress(title, config.steps, start, config.data.batch_size, quiet) as bar,
    (workdir / 'metrics.jsonl' if chief else Path(os.devnull)).open('a') as log,
    processes.Watchdog(config.watchdog_seconds) as watchdog,
  ):
    for step in range(start, config.steps):
      state, metrics = run.step(state, next(batches), step)
      pending.append((step + 1, metrics))
      watchdog.beat()
      done = step + 1
      if done % config.eval_every and done % config.log_every and done != config.steps:
        continue
      reached = False
      # One wait for the device for all the steps since the last.
      values = [(s, jax.tree.map(float, m)) for s, m in jax.device_get(pending)]
      trained += time.perf_counter() - clock
      for at, row in values:
        log.write(json.dumps({'step': at, **row}) + '\n')
        _check_finite(at, row)
      bar.warn_of_rejected(values[-1][1])
      pending, latest = [], dict(values[-1][1])
      latest.pop('finite_input')
      bar.update(done, latest)
      if done % config.eval_every == 0 or done == config.steps:
        scores = evaluate_all(run, state)
        row = {'step': done, 'seconds': trained, **{f'eval_{k}': v for k, v in scores.items()}}
        log.write(json.dumps(row) + '\n')
        log.flush()
        bar.note(scores)
        reached = arrived(run, [row])
      due = config.checkpoint_every and done % config.checkpoint_every == 0
      if config.keep_checkpoints and (due or reached or done == config.steps):
        save(run, checkpoints, done, state)
      if reached:
        break
      clock = time.perf_counter()


def _check_finite(step: int, row: dict[str, float]) -> None:
  if not row['finite_input']:
    raise RunError(f'step {step}: the batch holds values that are not finite; mend the data set')
  if not np.isfinite(row['loss']):
    raise RunError(f'step {step}: the loss is {row["loss"]}; lower the learning rate or raise the damping')


def _check_same_config(config: Any, path: Path) -> None:
  """A work folder belongs to one config, its length apart: a resumed run must be the run that was interrupted."""
  free = ('steps', 'target', 'stop_at_target', 'eval_every', 'log_every', 'checkpoint_every', 'keep_checkpoints')
  free = (*free, 'mesh', 'devices', 'watchdog_seconds', 'placement')
  new = json.loads(config.to_json())
  if path.exists():
    old = json.loads(path.read_text())
    changed = [k for k in new if k not in free and new[k] != old.get(k)]
    if changed:
      raise ConfigError(
        f'{path.parent} holds a run with another {", ".join(changed)}; choose another --workdir or remove it'
      )
  path.write_text(json.dumps(new, indent=2) + '\n')


def _drop_rows_after(path: Path, step: int) -> None:
  """Metrics logged after the checkpoint that is resumed from will be logged again."""
  if path.exists():
    rows = [line for line in path.read_text().splitlines() if json.loads(line)['step'] <= step]
    path.write_text(''.join(f'{line}\n' for line in rows))


def main(config: Any, workdir: str) -> None:
  """One run from the command line."""
  rows = train(config, workdir)
  if not processes.chief():
    return
  if rows:
    scores = ', '.join(f'{k.removeprefix("eval_")} {v:.4g}' for k, v in rows[-1].items() if k.startswith('eval_'))
    print(f'{scores} on {config.data.name}/{config.data.eval_split} after {rows[-1]["step"]} steps')
  covers = ', what K-FAC covers (coverage.txt)' if config.optimizer in SECOND_ORDER else ''
  print(f'metrics{covers} and checkpoints are in {workdir}')


if __name__ == '__main__':
  launch(main)
