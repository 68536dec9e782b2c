"""A config made real on a mesh: data, model, shardings and compiled programs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import constants, guard, kfac_jax_peer, memory, recipe, reduce, registry, writers
from experiments.errors import ConfigError
from experiments.inputs import make_data
from experiments.optimizers import SECOND_ORDER, make_optimizer, make_upkeep
from experiments.ranges import check_ranges, check_whole
from experiments.registry import make_task
from experiments.run import Run
from experiments.steps import TrainState, make_steps
from kronmesh import kron, parallel


def build(config: Any, load: bool = True) -> Run:
  """Makes mesh, data, model, shardings and compiled functions; everything that can be wrong with a config shows here.

  load: False where nothing is to run: data that shapes can do without are not read.
  """
  check_whole(config)
  check_ranges(config)
  if config.optimizer == kfac_jax_peer.NAME:
    return kfac_jax_peer.build(config, load)
  mesh = parallel.make_mesh(config.mesh)
  check(config, mesh)
  if config.task == 'generate':
    return registry.load('adversarial').build(config, mesh, load)
  task = make_task(config, parallel.batch_shards(mesh))
  own_collectives = reduce.check(config, mesh)
  rules = parallel.RULES[config.model.name]
  train_batches, eval_batches, batch, strips, known_by = make_data(config, mesh, load)
  pixels = batch['image']
  batch_sharding = {name: parallel.batch_sharding(mesh, config.data.batch_size) for name in batch}
  batch_sharding['image'] = parallel.image_sharding(mesh, config.data.batch_size, strips, len(pixels.shape))
  padded = jax.ShapeDtypeStruct(parallel.padded_shape(pixels.shape, strips), pixels.dtype)
  batch = {**batch, 'image': padded}
  lying = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731

  if config.recipe.cutmix and len(pixels.shape) != 5:
    raise ConfigError(f'config.recipe.cutmix cuts clips in time; images of {config.data.name} are {pixels.shape[1:]}')
  ranks = {'convnet': 4, 'resnet': 4, 'vit': 4, 'r2plus1d': 5, 'video_transformer': 5}  # at least
  if len(pixels.shape) < ranks.get(config.model.name, 0):
    needed = '(height, width, channels)' if ranks[config.model.name] == 4 else '(time, height, width, channels)'
    there = f'those of {config.data.name} are {pixels.shape[1:]}'
    raise ConfigError(
      f'{config.model.name} needs inputs of shape {needed}, and {there}; reshape them, or choose another config.model.name'
    )
  with of_model():
    boxed = jax.eval_shape(
      lambda: task.model.init(jax.random.key(0), jnp.zeros(pixels.shape, pixels.dtype), train=False)
    )
  logical = nn.get_partition_spec(boxed)['params']
  variables = nn.meta.unbox(boxed)
  params = variables.pop('params')
  recipe.check_patterns(config.recipe.rescale_weights, kron.param_names(params))
  mixed = functools.partial(
    recipe.mix,
    alpha=config.recipe.mixup,
    cut=config.recipe.cutmix,
    running=config.recipe.running_mixup,
    classes=config.model.get('classes', 0),
  )
  settings = dict(config.placement)
  in_blocks = settings.pop('blocks')
  placement = spread = parallel.Placement(mesh, **settings).check()
  if mesh.size == 1:  # nothing to pack, and nowhere to send it
    placement, spread = kron.Local(), None
  param_shardings = parallel.param_shardings(params, logical, rules, mesh)
  if load:
    memory.check_state(params, param_shardings)  # before K-FAC looks at what they are made of
  layers = parallel.layer_strips(param_shardings, params, mesh)
  if not own_collectives:
    task = task._replace(loss=on_mesh(task.loss, rules, mesh, strips, layers))
  curvature = None
  if config.optimizer in SECOND_ORDER:
    fisher = config[config.optimizer].fisher
    seen = jax.eval_shape(lambda b: mixed(b, recipe.nothing_mixed(config, padded), jax.random.key(0))[0], batch)
    if own_collectives:  # what one shard sees
      seen = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // mesh.size, *x.shape[1:]), x.dtype), seen)
    where = {} if own_collectives else {'placement': placement}
    where['blocks'] = parallel.shard_blocks(param_shardings) if in_blocks else None
    where['part'] = config[config.optimizer].part
    curvature = kron.curvature(
      recipe.scaled(config, task.loss),
      params,
      recipe.carried(config, variables),
      seen,
      fisher=fisher,
      has_aux=True,
      **where,
    )
  tx = make_optimizer(config, curvature, placement)
  upkeep = make_upkeep(config, curvature, placement)

  def init(seed: int) -> TrainState:
    key = jax.random.key(seed)
    variables = nn.meta.unbox(task.model.init(key, jnp.zeros(pixels.shape, pixels.dtype), train=False))
    params = variables.pop('params')
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      opt_state=tx.init(params),
      key=jax.random.fold_in(key, 1),
      guard=guard.new_guard(config),
      average=jax.tree.map(jnp.copy, params) if config.recipe.average else (),
      mixed=recipe.nothing_mixed(config, padded),
    )

  like = jax.eval_shape(init, 0)
  replicated = parallel.replicated(mesh)
  all_of = lambda tree, sharding: jax.tree.map(lambda _: sharding, tree)  # noqa: E731
  shardings = TrainState(
    step=replicated,
    params=param_shardings,
    model_state=constants.shardings(like.model_state, mesh),
    opt_state=parallel.state_shardings(like.opt_state, param_shardings, mesh, placement=spread),
    key=replicated,
    guard=all_of(like.guard, replicated),
    average=param_shardings if config.recipe.average else (),
    mixed={name: batch_sharding.get(name, batch_sharding['label']) for name in like.mixed} if like.mixed else (),
  )
  if load:
    memory.check_state(like, shardings)
  around = functools.partial(reduce.by_shard, config=config, mesh=mesh) if own_collectives else lambda fn: fn
  programs, step, evaluate = make_steps(
    config, task, curvature, tx, upkeep, mixed=mixed, around=around, shardings=shardings, batch_sharding=batch_sharding
  )
  return Run(
    config=config,
    task=task,
    mesh=mesh,
    curvatures={} if curvature is None else {'model': curvature},
    placement=placement,
    shardings=shardings,
    init=jax.jit(init, out_shardings=shardings),
    step=step,
    programs=programs,
    upkeep=upkeep,
    evaluate=evaluate,
    train_batches=train_batches,
    eval_batches=eval_batches,
    batch=jax.tree.map(lying, batch, batch_sharding),
    strips=strips,
    known_by=known_by,
  )


@contextlib.contextmanager
def of_model() -> Iterator[None]:
  """Raises ConfigError for what a model says of its settings, or of its input."""
  try:
    yield
  except Exception as error:
    lines = str(error).splitlines() or [type(error).__name__]
    raise ConfigError(f'config.model: {lines[0][:300]}') from error


def on_mesh(loss: Callable, rules: parallel.Rules, mesh: Mesh, strips: parallel.Strips, layers: Any) -> Callable:
  """The loss of (params, model state, batch, train) with its activations sharded, its images in strips and its layers in
  a pipeline, if any."""

  @functools.wraps(loss)
  def sharded(*args, **kwargs):
    with parallel.logical_axes(rules, mesh):
      return loss(*args, **kwargs)

  if not strips and layers is None:
    return sharded

  @functools.wraps(loss)
  def in_strips(params, model_state, batch, **kwargs):
    lie = {name: strips or None if name == 'image' else None for name in batch}
    whole = functools.partial(sharded, **kwargs)
    return parallel.split(whole, mesh, (layers, None, lie))(params, model_state, batch)

  return in_strips


def check(config: Any, mesh: Mesh) -> None:
  """Raises ConfigError for options that do not go together."""
  if config.stop_at_target:
    check_target(config)
  shards = parallel.batch_shards(mesh) * config.microbatches
  if config.microbatches > 1 and config.data.batch_size % shards:
    raise ConfigError(
      f'config.data.batch_size={config.data.batch_size} does not divide into {config.microbatches} microbatches of '
      f'{parallel.batch_shards(mesh)} shards'
    )
  if config.keep_best and not config.keep_checkpoints:
    raise ConfigError(
      f'config.keep_best={config.keep_best} keeps nothing where config.keep_checkpoints=0; set that to 1'
    )
  guard.check(config)
  recipe.check(config)
  writers.check(config)


def check_target(config: Any) -> None:
  """Raises ConfigError if the config has no target."""
  if not config.target:
    raise ConfigError('set config.target: the value of the metric that is to be reached')
