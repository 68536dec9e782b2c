"""Runs kfac-jax's own optimiser on a config, so that `kronmesh compare` can measure it beside ours.

kfac-jax is a separate package, which is not installed with this project. Its newest release, 0.0.8, does not run
on jax >= 0.10. Its git repository does from babd853 on, with jax 0.12:

  pip install dm-haiku distrax
  pip install git+https://github.com/google-deepmind/kfac-jax

It trains on one device, whatever the config's mesh is, and writes no checkpoints. Its adaptive mode chooses the
learning rate, momentum and damping.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import kron, parallel
from ..kron import observe
from ..program import visiting
from . import guard
from .errors import ConfigError
from .inputs import make_data
from .registry import make_task
from .reporting import writers
from .run import Run
from .steps import TrainState
from .task import Task

NAME = 'kfac_jax'
REMEDY = 'install kfac-jax from its git repository, babd853 or later, with dm-haiku and distrax, beside jax 0.12'


@functools.cache
def why_not() -> str | None:
  """Returns one line that says why kfac-jax does not run here, or None if it does.

  It tries one step of kfac-jax on a network of one layer.
  """

  def loss(params, x):
    z = x @ params
    kfac_jax.register_squared_error_loss(z)
    return (z**2).sum(-1).mean()

  try:
    import kfac_jax

    optimizer = kfac_jax.Optimizer(jax.value_and_grad(loss), **_adaptive(1.0), num_burnin_steps=0)
    params, x, key = jnp.ones((2, 2)), jnp.ones((3, 2)), jax.random.key(0)
    optimizer.step(params, optimizer.init(params, key, x), key, batch=x)
  except ModuleNotFoundError as error:
    return f'the package {error.name} is not installed; {REMEDY}'
  except Exception as error:
    return f'the kfac-jax that is installed fails here ({_one_line(error)}); {REMEDY}'
  return None


def _one_line(error: Exception) -> str:
  lines = str(error).splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:150]}'


def _adaptive(damping: float) -> dict[str, Any]:
  """Returns the arguments that make kfac-jax choose learning rate, momentum and damping itself."""
  names = ('use_adaptive_learning_rate', 'use_adaptive_momentum', 'use_adaptive_damping')
  return {'l2_reg': 0.0, 'initial_damping': damping, **dict.fromkeys(names, True)}


def at_marks(fn: Callable, visit: Callable[[jax.Array, kron.observe.Likelihood], None]) -> Callable:
  """Returns `fn` with a call of `visit(outputs, likelihood)` wherever `kron.observe` marks outputs.

  Operations stay as they are, including nested calls; marks inside a nested call are not visited.

  Raises:
    ConfigError: there is no mark, or a mark weights its observations.
  """

  def visited(*args):
    marks = 0

    def one(outputs: jax.Array, params: dict[str, Any]) -> None:
      nonlocal marks
      if params.get('weighted') or params.get('masked'):
        raise ConfigError('kfac-jax has no weights of observations, as a mask of kron.observe gives')
      visit(outputs, params['likelihood'])
      marks += 1

    result = visiting(fn, one)(*args)
    if not marks:
      raise ConfigError('the loss marks no outputs by kron.observe that kfac-jax could be told of')
    return result

  return functools.wraps(fn)(visited)


def register(outputs: jax.Array, likelihood: kron.observe.Likelihood, targets: jax.Array | None = None) -> None:
  """Registers the predictive distribution of outputs with kfac-jax.

  The loss must be a mean over the observations.

  Raises:
    ConfigError: kfac-jax does not have this likelihood.
  """
  import kfac_jax

  leading = outputs.shape[: outputs.ndim - likelihood.event_ndims]
  more = {'targets': targets, 'weight': leading[0] / math.prod(leading)}  # kfac-jax sums over an example's observations
  if isinstance(likelihood, observe.Categorical):
    kfac_jax.register_categorical_predictive_distribution(outputs, **more)
  elif isinstance(likelihood, observe.Bernoulli):
    kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, **more)
  elif isinstance(likelihood, observe.Gaussian):
    kfac_jax.register_normal_predictive_distribution(outputs, variance=likelihood.variance, **more)
  else:
    raise ConfigError(f'kfac-jax has no predictive distribution for {type(likelihood).__name__}')


class Peer(NamedTuple):
  """A task and the optimiser of kfac-jax that trains it. settings: the config's section for kfac-jax."""

  task: Task
  optimizer: Any
  settings: Any


def build(config: Any, load: bool = True) -> Run:
  """Makes a `Run` that kfac-jax trains on one device; `load` is as in `kronmesh.train.build.build`.

  Raises:
    ConfigError: kfac-jax does not run here, or the config asks for something that it does not have.
  """
  check(config)
  mesh = parallel.make_mesh('data=1', jax.devices()[:1])
  task = make_task(config)
  train_batches, eval_batches, batch, strips, known_by = make_data(config, mesh, load)
  pixels, everywhere = batch['inputs'], parallel.replicated(mesh)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for name, x in batch.items()}
  peer = Peer(task, _optimizer(task, config[NAME]), config[NAME])
  init = functools.partial(_init, peer, config, pixels, batch)
  loss = _loss(task)

  def gradient(state: TrainState, batch: Any, statistics: bool, refresh: bool) -> Any:
    return jax.value_and_grad(loss, has_aux=True)(state.params, state.model_state, batch)

  def evaluate(state: TrainState, batch: Any) -> dict[str, jax.Array]:
    metrics = task.loss(state.params, state.model_state, batch, train=False)[1][0]
    return {**metrics, 'examples': batch['mask'].sum()}

  try:
    like = jax.eval_shape(init, 0)
  except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
    raise ConfigError(f'kfac-jax cannot read this network: {_one_line(error)}') from error
  return Run(
    config=config,
    task=task,
    mesh=mesh,
    curvatures={},
    placement=kron.Local(),
    shardings=jax.tree.map(lambda _: everywhere, like),
    init=init,
    step=_compiled_first(peer),
    programs={'step': jax.jit(gradient, static_argnums=(2, 3))},  # the plain gradient, to count its operations
    inverse_schedule=None,
    evaluate=jax.jit(evaluate),
    train_batches=train_batches,
    eval_batches=eval_batches,
    batch=batch,
    strips=strips,
    known_by=known_by,
  )


def _loss(task: Task) -> Callable:
  def loss(params, model_state, batch):
    value, (metrics, model_state) = task.loss(params, model_state, batch)
    return value, (model_state, {**metrics, 'finite_input': jnp.isfinite(batch['inputs']).all()})

  return loss


def _optimizer(task: Task, settings: Any) -> Any:
  import kfac_jax

  marked = jax.value_and_grad(at_marks(_loss(task), register), has_aux=True)

  def value_and_grad(params, model_state, batch):
    (loss, (model_state, metrics)), grads = marked(params, model_state, batch)
    norms = guard.norms(grads)
    held = ~(jnp.isfinite(loss) & jnp.isfinite(norms).all())
    return (loss, (model_state, {**metrics, 'held': held, 'gradient_norms': norms})), grads

  return kfac_jax.Optimizer(
    value_and_grad,
    value_func_has_aux=True,
    value_func_has_state=True,
    curvature_ema=settings.decay,
    curvature_update_period=settings.statistics_every,
    inverse_update_period=settings.inverses_every,
    damping_adaptation_interval=settings.damping_every,
    damping_adaptation_decay=settings.damping_rate,
    min_damping=settings.smallest_damping,
    num_burnin_steps=settings.burn_in_steps,
    batch_size_extractor=lambda batch: batch['inputs'].shape[0],
    **_adaptive(settings.damping),
  )


def _init(peer: Peer, config: Any, pixels: Any, batch: Any, seed: int) -> TrainState:
  key = jax.random.key(seed)
  variables = nn.meta.unbox(peer.task.model.init(key, jnp.zeros(pixels.shape, pixels.dtype), train=False))
  params, empty = variables.pop('params'), {name: jnp.zeros(x.shape, x.dtype) for name, x in batch.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=variables,
    opt_state=peer.optimizer.init(params, key, empty, variables),
    key=jax.random.fold_in(key, 1),
    guard=guard.new_guard(config),
  )


def _step(peer: Peer, state: TrainState, batch: Any, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
  if peer.settings.burn_in_steps and not number:
    # The first step takes statistics of several draws before it. It overwrites its batches, hence the copies.
    data = {'data_iterator': (jax.tree.map(jnp.copy, batch) for _ in itertools.count())}
  else:
    data = {'batch': batch}
  params, opt_state, model_state, stats = peer.optimizer.step(
    state.params,
    state.opt_state,
    jax.random.fold_in(state.key, number),
    func_state=state.model_state,
    global_step_int=number,
    **data,
  )
  chosen = {name: stats[name] for name in ('damping', 'learning_rate', 'momentum')}
  state = state._replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
  return state, {**stats['aux'], **chosen}


def _compiled_first(peer: Peer) -> Callable:
  """Returns a step whose first call compiles the three programs: first step, later steps, changes of the damping."""
  compiled: list[bool] = []

  def step(state: TrainState, batch: Any, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
    if not compiled:
      compiled.append(True)
      rehearsed = jax.tree.map(jnp.copy, state)
      for earlier in range(number + peer.settings.damping_every + 1):
        rehearsed, _ = _step(peer, rehearsed, batch, earlier)
    return _step(peer, state, batch, number)

  return step


def check(config: Any) -> None:
  """Raises ConfigError if kfac-jax does not run here, or if it cannot be run in this way with this config."""
  why = why_not()
  if why:
    raise ConfigError(f'config.optimizer={NAME!r} cannot run: {why}')
  writers.check(config)
  settings = config.recipe
  for name, value, none in (
    ('keep_checkpoints', config.keep_checkpoints, 0),
    ('microbatches', config.microbatches, 1),
    ('gradients.all_reduce', config.gradients.all_reduce, 'auto'),
    *((f'recipe.{name}', settings[name], 0) for name in ('mixup', 'cutmix', 'clip_norm', 'average', 'loss_scale')),
    ('recipe.rescale_weights', settings.rescale_weights, ()),
  ):
    if value != none:
      raise ConfigError(f'config.{name}={value!r} does not work with config.optimizer={NAME!r}; set it to {none!r}')
  if config.faults.spike != 'ignore' or config.faults.not_finite not in ('skip', 'stop'):
    raise ConfigError(f"config.optimizer={NAME!r} works only with faults.spike='ignore' and faults.not_finite='skip'")
  if config[NAME].statistics_every > config[NAME].inverses_every:
    raise ConfigError(f'config.{NAME}.statistics_every must be at most inverses_every')
  if config.task == 'generate':
    raise ConfigError(f'config.optimizer={NAME!r} trains one network, not two players')
