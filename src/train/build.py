"""The building of a run from a config and a mesh: data, model, shardings and compiled programs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from .. import kron, parallel
from . import constants, gradient_allreduce, guard, kfac_jax_peer, loss_scale, memory, mixing, recipe
from .errors import ConfigError
from .fitting import fit
from .inputs import Data, make_data
from .optimizers import SECOND_ORDER, make_inverse_schedule, make_optimizer
from .players import ONLY, Game, Player, joined, part
from .registry import make_task
from .reporting import writers
from .run import Run
from .settings.ranges import check_ranges, check_whole
from .steps import Plan, TrainState, make_steps
from .task import Task


def build(config: Any, load: bool = True) -> Run:
  """Builds a run from a config: mesh, data, model, shardings and compiled functions.

  Any mistake in the config raises its error here.

  Args:
    config: a config, such as `defaults()` returns.
    load: False if nothing is to run; data that the shapes do not depend on are then not read.

  Returns:
    A `Run`, a named tuple. `init` makes the state from a seed. `train_batches` takes the seed and the number of the
    first batch, and returns endless batches; `eval_batches` returns those of one pass over the evaluation set. `step`
    takes (state, batch, the step's number) and returns (state, metrics); `evaluate` takes (state, batch) and returns
    metrics. `curvatures` has the `kron.Curvature` of each network with a second-order optimiser, by name, `mesh` the
    mesh, and `shardings` the state's shardings.

  Raises:
    ConfigError: a setting is unknown, out of range, or does not go together with another one.
    parallel.MeshError: the mesh, or the batch on it, does not fit the devices.
    data.DataError: the data are missing or cannot be used.
    kron.CurvatureError: K-FAC cannot treat the network or its loss.
  """
  check_whole(config)
  fit(config)
  check_ranges(config)
  if config.optimizer == kfac_jax_peer.NAME:
    return kfac_jax_peer.build(config, load)
  mesh = parallel.make_mesh(config.mesh)
  check(config, mesh)
  task = make_task(config, parallel.batch_shards(mesh))
  own_collectives = gradient_allreduce.check(config, mesh)
  data = make_data(config, mesh, load)
  batch, batch_sharding = _batch(config, mesh, data)
  if task.game is None:
    _check_input(config, data.like['inputs'].shape)
  game = None if task.game is None else task.game(data, mesh)
  networks = _networks(config, mesh, task, game, data.like['inputs'])
  if load:
    memory.check_state(networks.params, networks.shardings)  # before K-FAC reads the networks
  if game is None and not own_collectives:
    layers = parallel.layer_strips(networks.shardings, networks.params, mesh)
    task = task._replace(loss=on_mesh(task.loss, networks.rules, mesh, data.strips, layers))
  placement = networks.placement
  seen = _seen_by_loss(config, batch, mesh.size if own_collectives else 1) if game is None else game.example
  players = {name: _player(name, config, task, game, networks, seen, own_collectives) for name in networks.variables}
  schedule = make_inverse_schedule(config, players[ONLY].curvature, placement) if game is None else None
  init = functools.partial(_init, config, networks, players, batch['inputs'])
  like = jax.eval_shape(init, 0)
  shardings = _state_shardings(like, networks, mesh, placement, batch_sharding)
  if load:
    memory.check_state(like, shardings)
  around = functools.partial(gradient_allreduce.by_shard, config=config, mesh=mesh) if own_collectives else _plainly
  steps = Plan(config, task, players, game, schedule, _mixing(config), around, shardings, batch_sharding)
  programs, step, evaluate = make_steps(steps)
  lying = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  return Run(
    config=config,
    task=task,
    mesh=mesh,
    curvatures={name: p.curvature for name, p in players.items() if p.curvature is not None},
    placement=placement,
    shardings=shardings,
    init=jax.jit(init, out_shardings=shardings),
    step=step,
    programs=programs,
    inverse_schedule=schedule,
    evaluate=evaluate,
    train_batches=data.train,
    eval_batches=data.held_out,
    batch=jax.tree.map(lying, batch, batch_sharding),
    strips=data.strips,
    known_by=data.known_by,
    draw=None if game is None else game.draw,
  )


class Networks(NamedTuple):
  """The players' networks before they are trained.

  variables: each player's (key) -> its variables, in flax's boxes.
  params, states: the shapes of all parameters and states.
  shardings: the shardings of the parameters.
  rules: the rules for the models' logical axes.
  placement: the placement of K-FAC's factors.
  """

  variables: dict[str, Callable]
  params: Any
  states: Any
  shardings: Any
  rules: parallel.Rules
  placement: kron.Placement


def _networks(config: Any, mesh: Mesh, task: Task, game: Game | None, images: jax.ShapeDtypeStruct) -> Networks:
  if game is None:
    init = lambda key: task.model.init(key, jnp.zeros(images.shape, images.dtype), train=False)  # noqa: E731
    variables = {ONLY: init}
  else:
    variables = {name: functools.partial(game.variables, name) for name in game.names}
  with of_model():
    boxed = {name: jax.eval_shape(fn, jax.random.key(0)) for name, fn in variables.items()}
  rules = parallel.RULES[config.model.name]
  states = {name: dict(nn.meta.unbox(variables)) for name, variables in boxed.items()}
  params = {name: variables.pop('params') for name, variables in states.items()}
  shardings = {
    name: parallel.param_shardings(params[name], nn.get_partition_spec(variables)['params'], rules, mesh)
    for name, variables in boxed.items()
  }
  if game is None:
    recipe.check_patterns(config.recipe.rescale_weights, kron.param_names(params[ONLY]))
  return Networks(variables, joined(params), joined(states), joined(shardings), rules, _placement(config, mesh))


def _batch(config: Any, mesh: Mesh, data: Data) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the shapes of a training batch, with the padding of its strips, and the shardings of its arrays."""
  pixels, size = data.like['inputs'], config.data.batch_size
  shardings = {name: parallel.batch_sharding(mesh, size) for name in data.like}
  shardings['inputs'] = parallel.image_sharding(mesh, size, data.strips, len(pixels.shape))
  padded = jax.ShapeDtypeStruct(parallel.padded_shape(pixels.shape, data.strips), pixels.dtype)
  return {**data.like, 'inputs': padded}, shardings


def _check_input(config: Any, shape: tuple[int, ...]) -> None:
  """Raises ConfigError for a network, or a recipe, that takes inputs of another rank than the data have."""
  if config.recipe.cutmix and len(shape) != 5:
    raise ConfigError(f'config.recipe.cutmix cuts clips in time; images of {config.data.name} are {shape[1:]}')
  ranks = {'convnet': 4, 'resnet': 4, 'vit': 4, 'r2plus1d': 5, 'video_transformer': 5}  # the least rank
  if len(shape) < ranks.get(config.model.name, 0):
    needed = '(height, width, channels)' if ranks[config.model.name] == 4 else '(time, height, width, channels)'
    there = f'those of {config.data.name} are {shape[1:]}'
    raise ConfigError(
      f'{config.model.name} needs inputs of shape {needed}, and {there}; reshape them, or choose another config.model.name'
    )


def _mixing(config: Any) -> Callable:
  recipe_settings = config.recipe
  settings = {'alpha': recipe_settings.mixup, 'cut': recipe_settings.cutmix, 'running': recipe_settings.running_mixup}
  return functools.partial(mixing.mix, **settings, classes=config.model.get('classes', 0))


def _seen_by_loss(config: Any, batch: dict[str, Any], shards: int) -> dict[str, Any]:
  """Returns the shapes of the batch that the loss takes: mixed, and one shard's if each computes its own gradient."""
  nothing = mixing.nothing_mixed(config, batch['inputs'])
  seen = jax.eval_shape(lambda b: _mixing(config)(b, nothing, jax.random.key(0))[0], batch)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // shards, *x.shape[1:]), x.dtype), seen)


def _placement(config: Any, mesh: Mesh) -> kron.Placement:
  settings = {name: value for name, value in config.placement.items() if name != 'blocks'}
  placement = parallel.Placement(mesh, **settings).check()
  return placement if mesh.size > 1 else kron.Local()  # one device has nothing to pack and nowhere to send it


def _player(
  name: str, config: Any, task: Task, game: Game | None, networks: Networks, seen: Any, by_shard: bool
) -> Player:
  """Makes a player: its optimiser and, for one of second order, the curvature read from its loss.

  by_shard: whether each shard computes its own gradient.
  """
  if game is None:
    player_config, loss = config, loss_scale.scaled(config, task.loss)
    context = loss_scale.carried(config, networks.states)
  else:
    player_config, loss = game.config_of(name), game.losses[name]
    context = game.context(name, networks.params, networks.states)
  params, curvature = part(networks.params, name), None
  if player_config.optimizer in SECOND_ORDER:
    section = player_config[player_config.optimizer]
    settings = {
      'fisher': section.fisher,
      'subsample': _whole_subsample(section.subsample, seen, networks.placement),
      'placement': None if by_shard else networks.placement,
    }
    gradient_only = getattr(task.model, 'gradient_only', ())
    if gradient_only:
      settings['fallback'] = dict.fromkeys(gradient_only, 'gradient')
    if config.placement.blocks:
      settings['blocks'] = parallel.shard_blocks(part(networks.shardings, name))
    curvature = kron.curvature(loss, params, context, seen, has_aux=True, **settings)
  tx = make_optimizer(player_config, curvature, networks.placement, inside=game is not None)
  return Player(name, player_config, loss, curvature, tx)


def _whole_subsample(subsample: float, seen: Any, placement: kron.Placement | kron.Local) -> float:
  """Returns the share nearest to `subsample` that is a whole number of a shard's examples, and warns if it differs."""
  if subsample == 1 or not isinstance(seen, dict) or 'inputs' not in seen:
    return subsample
  examples = seen['inputs'].shape[0]
  each = examples // max(1, placement.shards(examples))
  kept = max(1, round(subsample * each))
  if abs(kept - subsample * each) > 1e-6:
    words = 'config.kfac.subsample=%g of the %d examples of a shard is not a whole number; %d are taken'
    logging.warning(words, subsample, each, kept)
  return kept / each


def _init(
  config: Any, networks: Networks, players: dict[str, Player], image: jax.ShapeDtypeStruct, seed: int
) -> TrainState:
  key, count = jax.random.key(seed), len(players)
  keys = [key] if count == 1 else [jax.random.fold_in(key, i) for i in range(count)]
  made = {name: dict(nn.meta.unbox(fn(key))) for (name, fn), key in zip(networks.variables.items(), keys, strict=True)}
  params = {name: variables.pop('params') for name, variables in made.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=joined(params),
    model_state=joined(made),
    opt_state=joined({name: player.tx.init(params[name]) for name, player in players.items()}),
    key=jax.random.fold_in(key, count),
    guard=guard.new_guard(config),
    average=jax.tree.map(jnp.copy, joined(params)) if config.recipe.average else (),
    mixed=mixing.nothing_mixed(config, image),
  )


def _state_shardings(
  like: TrainState, networks: Networks, mesh: Mesh, placement: kron.Placement, batch_sharding: dict[str, Any]
) -> TrainState:
  replicated = parallel.replicated(mesh)
  spread = None if isinstance(placement, kron.Local) else placement
  of_optimizer = lambda name: parallel.state_shardings(  # noqa: E731
    part(like.opt_state, name), part(networks.shardings, name), mesh, placement=spread
  )
  return TrainState(
    step=replicated,
    params=networks.shardings,
    model_state=constants.shardings(like.model_state, mesh),
    opt_state=joined({name: of_optimizer(name) for name in networks.variables}),
    key=replicated,
    guard=jax.tree.map(lambda _: replicated, like.guard),
    average=networks.shardings if like.average else (),
    mixed={name: batch_sharding.get(name, batch_sharding['label']) for name in like.mixed} if like.mixed else (),
  )


def _plainly(fn: Callable) -> Callable:
  return fn


@contextlib.contextmanager
def of_model() -> Iterator[None]:
  """Raises ConfigError for errors that a model raises about its settings or its input."""
  try:
    yield
  except Exception as error:
    lines = str(error).splitlines() or [type(error).__name__]
    raise ConfigError(f'config.model: {lines[0][:300]}') from error


def on_mesh(loss: Callable, rules: parallel.Rules, mesh: Mesh, strips: parallel.Strips, layers: Any) -> Callable:
  """Returns the loss with its activations sharded, its images in strips and its layers in a pipeline, if any.

  loss: takes (params, model state, batch, train).
  """

  @functools.wraps(loss)
  def sharded(*args, **kwargs):
    with parallel.logical_axes(rules, mesh):
      return loss(*args, **kwargs)

  if not strips and layers is None:
    return sharded

  @functools.wraps(loss)
  def in_strips(params, model_state, batch, **kwargs):
    lie = {name: strips or None if name == 'inputs' else None for name in batch}
    whole = functools.partial(sharded, **kwargs)
    return parallel.partition(whole, mesh, (layers, None, lie))(params, model_state, batch)

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
