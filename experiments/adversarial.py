"""Two networks against each other: a generator and a discriminator, each with its optimiser, under one sharded step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments import guard, memory, recipe
from experiments.errors import ConfigError
from experiments.inputs import make_data
from experiments.judge import Judge, read_judge
from experiments.networks import TASK, Networks, grid, networks
from experiments.players import NAMES, config_of, make_player, second_order
from experiments.run import Run
from experiments.steps import TrainState, phase
from experiments.task import Task
from kronmesh import kron, models, parallel

Batch = dict[str, Array]


def make_task(config: Any, parts: int = 1) -> Task:
  """The task of a run; its score is what share of images a judge gives the class asked for, without one the loss."""
  del parts
  judged = bool(config.gan.judge)
  return Task(networks(config), _unbuilt, 'agreement' if judged else 'loss', not judged)


def _unbuilt(*_: Any, **__: Any) -> Any:
  raise ConfigError('the loss of two players is that of a run that is built')


def hinge(real: Float[Array, ' b'], fake: Float[Array, ' b']) -> Float[Array, '']:
  """The discriminator's loss (Lim and Ye 2017, arXiv:1705.02894, eq. 8); the generator's is -mean(fake)."""
  return nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()


def losses(nets: Networks, policy: tuple[str, ...]) -> dict[str, Callable]:
  """By player: (params, (own state, the other's variables), batch) -> (loss, (metrics, own new state)).

  What is observed is the discriminator's output, as that of a Gaussian: K-FAC measures a step of either player by how far
  the output goes.
  """
  generator, discriminator = nets

  def applied(net, params, state, *args):
    out, new = net.apply({'params': params, **state}, *args, train=True, mutable=list(state))
    return out, new

  def of_discriminator(params, context, batch):
    state, _ = context
    pairs = jnp.stack([batch['image'], batch['made']], 1)  # beside each other: both lie as the batch does
    images = models.augment(pairs.reshape(-1, *pairs.shape[2:]), batch['key'], policy)
    out, state = applied(discriminator, params, state, images, jnp.repeat(batch['label'], 2))
    out = kron.observe.gaussian(out[:, None])[:, 0].reshape(-1, 2)
    value = hinge(out[:, 0], out[:, 1])
    return value, ({'loss': value, 'real': out[:, 0].mean(), 'made': out[:, 1].mean()}, state)

  def of_generator(params, context, batch):
    state, other = context
    images, state = applied(generator, params, state, batch['noise'], batch['label'])
    images = models.augment(images, batch['key'], policy)
    out = discriminator.apply(other, images, batch['label'], train=False)
    value = -kron.observe.gaussian(out[:, None]).mean()
    return value, ({'generator_loss': value}, state)

  return {'generator': of_generator, 'discriminator': of_discriminator}


def penalty(net: models.Discriminator, variables: Any, batch: Batch, policy: tuple[str, ...]) -> Float[Array, '']:
  """R1: half the mean squared slope of the discriminator at real images (Mescheder et al. 2018, eq. 9)."""

  def total(images):
    return net.apply(variables, models.augment(images, batch['key'], policy), batch['label'], train=False).sum()

  return 0.5 * (jax.grad(total)(batch['image']) ** 2).sum((1, 2, 3)).mean()


OTHER = {'generator': 'discriminator', 'discriminator': 'generator'}


def build(config: Any, mesh: Mesh, load: bool = True) -> Run:
  """As `build.build`, of a config with two players."""
  check(config)
  nets, rules = networks(config), parallel.RULES['gan']
  judge = read_judge(config.gan.judge) if config.gan.judge else None
  train_batches, eval_batches, batch, strips, known_by = make_data(config, mesh, load)
  check_batch(config, mesh, batch['image'].shape[1:], strips)
  like = examples(config)
  boxed = {name: jax.eval_shape(functools.partial(_variables, nets, name, like), jax.random.key(0)) for name in NAMES}
  shapes = {name: dict(nn.meta.unbox(b)) for name, b in boxed.items()}
  params = {name: own.pop('params') for name, own in shapes.items()}
  lying = {
    name: parallel.param_shardings(params[name], nn.get_partition_spec(boxed[name])['params'], rules, mesh)
    for name in NAMES
  }
  placement, spread = kron.Local(), None
  if mesh.size > 1:
    settings = {k: v for k, v in config.placement.items() if k != 'blocks'}
    placement = spread = parallel.Placement(mesh, **settings).check()
  on_mesh = functools.partial(_on_mesh, rules=rules, mesh=mesh)
  loss = {name: on_mesh(fn) for name, fn in losses(nets, tuple(config.gan.augment)).items()}
  own = {name: config_of(config, name) for name in NAMES}
  curvature = curvatures(own, loss, params, shapes, like, placement)
  tx = {name: make_player(own[name], curvature.get(name), placement) for name in NAMES}

  def init(seed: int) -> TrainState:
    key = jax.random.key(seed)
    made = {
      name: dict(nn.meta.unbox(_variables(nets, name, like, jax.random.fold_in(key, i))))
      for i, name in enumerate(NAMES)
    }
    params = {name: m.pop('params') for name, m in made.items()}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=made,
      opt_state={name: tx[name].init(params[name]) for name in NAMES},
      key=jax.random.fold_in(key, len(NAMES)),
      guard=guard.new_guard(config),
      average=jax.tree.map(jnp.copy, params) if config.recipe.average else (),
    )

  everywhere = parallel.replicated(mesh)
  state = jax.eval_shape(init, 0)
  shardings = state_shardings(state, lying, mesh, spread)
  if load:
    memory.check_state(state, shardings)
  batch_sharding = dict.fromkeys(batch, parallel.batch_sharding(mesh, config.data.batch_size))
  compiled = jax.jit(
    make_step(config, nets, loss, curvature, tx, shardings, batch_sharding),
    in_shardings=(shardings, batch_sharding),
    out_shardings=(shardings, everywhere),
    static_argnums=(2, 3),
    donate_argnums=0,
  )
  leader = next((own[name] for name in NAMES[::-1] if second_order(own[name])), own['generator'])
  generate = on_mesh(functools.partial(_generate, nets.generator, bool(config.recipe.average)))
  pictures = jax.jit(
    lambda state: generate(state, jax.random.key(0), jnp.arange(config.model.classes).repeat(config.model.classes)),
    in_shardings=(shardings,),
    out_shardings=everywhere,
  )
  evaluate = functools.partial(_evaluate, config, nets.discriminator, generate, judge)
  return Run(
    config=config,
    task=make_task(config)._replace(loss=functools.partial(_both_losses, config, nets, loss)),
    mesh=mesh,
    curvatures=curvature,
    placement=placement,
    shardings=shardings,
    init=jax.jit(init, out_shardings=shardings),
    step=lambda state, batch, number: compiled(state, batch, *phase(leader, number)),
    programs={'step': compiled},
    upkeep=None,
    evaluate=jax.jit(evaluate, in_shardings=(shardings, None), out_shardings=everywhere),
    train_batches=train_batches,
    eval_batches=eval_batches,
    batch=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, batch_sharding),
    strips=strips,
    known_by=known_by,
    draw=lambda state: (255 * grid(np.asarray(pictures(state)), config.model.classes)).round().astype(np.uint8),
  )


def examples(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """What one step of a player sees: a part of the batch, images made for its labels, the noise that they are made of."""
  own, each = config.model, config.data.batch_size // config.gan.discriminator_steps
  image = jax.ShapeDtypeStruct((each, own.size, own.size, own.channels), jnp.float32)
  return {
    'image': image,
    'made': image,
    'label': jax.ShapeDtypeStruct((each,), jnp.int32),
    'noise': jax.ShapeDtypeStruct((each, own.latent), jnp.float32),
    'key': jax.eval_shape(lambda: jax.random.key(0)),
  }


def _variables(nets: Networks, name: str, like: dict[str, jax.ShapeDtypeStruct], key: Array) -> Any:
  first = jnp.zeros(like['noise' if name == 'generator' else 'image'].shape)
  return getattr(nets, name).init(key, first, jnp.zeros(like['label'].shape, jnp.int32), train=True)


def curvatures(
  own: dict[str, Any], loss: dict[str, Callable], params: Any, shapes: Any, like: Any, placement: kron.Placement
) -> dict[str, kron.Curvature]:
  """Of those players whose optimiser (`own` has each one's config) is of second order."""

  def one(name: str) -> kron.Curvature | None:
    if not second_order(own[name]):
      return None
    context = shapes[name], {'params': params[OTHER[name]], **shapes[OTHER[name]]}
    section = own[name][own[name].optimizer]
    settings = {'fisher': section.fisher, 'part': section.part, 'placement': placement}
    return kron.curvature(loss[name], params[name], context, like, has_aux=True, **settings)

  return {name: own for name in NAMES if (own := one(name)) is not None}


def state_shardings(like: TrainState, params: Any, mesh: Mesh, placement: parallel.Placement | None) -> TrainState:
  """Of a state of these shapes."""
  everywhere = lambda tree: jax.tree.map(lambda _: parallel.replicated(mesh), tree)  # noqa: E731
  of_optimizer = lambda name: parallel.state_shardings(  # noqa: E731
    like.opt_state[name], params[name], mesh, placement=placement
  )
  return TrainState(
    step=parallel.replicated(mesh),
    params=params,
    model_state=everywhere(like.model_state),
    opt_state={name: of_optimizer(name) for name in NAMES},
    key=parallel.replicated(mesh),
    guard=everywhere(like.guard),
    average=params if like.average else (),
  )


def _evaluate(
  config: Any,
  net: models.Discriminator,
  generate: Callable,
  judge: Judge | None,
  state: TrainState,
  batch: Batch,
) -> dict[str, Array]:
  # Noise of its own for every batch: of one key (a built run may be trained with several seeds) and what is in it.
  key = jax.random.fold_in(jax.random.key(0), (1e3 * batch['image'].mean()).astype(jnp.uint32))
  made = generate(state, key, batch['label'])
  variables = {'params': state.params['discriminator'], **state.model_state['discriminator']}
  real, fake = (net.apply(variables, images, batch['label'], train=False) for images in (batch['image'], made))
  found = {'loss': nn.relu(1 - real) + nn.relu(1 + fake), 'real': real, 'made': fake}
  if judge is not None:
    found['agreement'] = judge.logits(made).argmax(-1) == batch['label']
  return {**{k: recipe.mean(v, batch) for k, v in found.items()}, 'examples': batch['mask'].sum()}


def _both_losses(
  config: Any,
  nets: Networks,
  loss: dict[str, Callable],
  params: Any,
  model_state: Any,
  batch: Batch,
  train: bool = True,
) -> Any:
  """Their sum, for whoever looks for a fault."""
  del train
  noise, made, key = _drawn(config, nets, params, model_state, batch['label'], jax.random.key(0))
  full = {**batch, 'noise': noise, 'made': made, 'key': key}
  context = lambda name: (model_state[name], {'params': params[OTHER[name]], **model_state[OTHER[name]]})  # noqa: E731
  total = sum(loss[name](params[name], context(name), full)[0] for name in NAMES)
  return total, ({'loss': total}, model_state)


def make_step(
  config: Any,
  nets: Networks,
  loss: dict[str, Callable],
  curvature: dict[str, kron.Curvature],
  tx: dict[str, optax.GradientTransformationExtraArgs],
  shardings: TrainState,
  batch_sharding: Any,
) -> Callable:
  """(state, batch, statistics, refresh) -> (state, metrics): the discriminator's steps, each on its part of the batch, then
  the generator's. A step that is not sound changes nothing.
  """
  count, policy = config.gan.discriminator_steps, tuple(config.gan.augment)

  def moved(name, params, model_state, opt_state, batch, key, statistics, refresh):
    """One step of a player: all of the new state, its gradient and metrics."""
    context = model_state[name], {'params': params[OTHER[name]], **model_state[OTHER[name]]}
    own, extra = curvature.get(name), {}
    if own is None:
      (_, aux), grads = jax.value_and_grad(loss[name], has_aux=True)(params[name], context, batch)
    else:
      found = own.value_and_grad(params[name], context, batch, key=key, statistics=statistics)
      (_, aux), grads, stats = found
      extra = {'stats': stats, 'phase': 'refresh' if refresh else 'plain'}
    if name == 'discriminator' and config.gan.r1:
      variables = lambda p: {'params': p, **model_state[name]}  # noqa: E731
      slopes = jax.grad(lambda p: penalty(nets.discriminator, variables(p), batch, policy))(params[name])
      grads = jax.tree.map(lambda g, s: g + config.gan.r1 * s, grads, slopes)
    grads = jax.lax.with_sharding_constraint(grads, shardings.params[name])
    updates, new = tx[name].update(grads, opt_state[name], params[name], **extra)
    metrics, state = aux
    params = {**params, name: optax.apply_updates(params[name], updates)}
    return params, {**model_state, name: state}, {**opt_state, name: new}, grads, metrics

  def step(state: TrainState, batch: Batch, statistics: bool, refresh: bool) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(state.key, state.step)
    params, model_state, opt_state = state.params, state.model_state, state.opt_state
    parts = recipe.microbatches(batch, count, batch_sharding)
    grads, metrics, finite = {}, {}, jnp.isfinite(batch['image']).all()
    for number, name in enumerate(['discriminator'] * count + ['generator']):
      part = jax.tree.map(lambda x, number=number: x[number % count], parts)
      draw, mark, own = jax.random.split(jax.random.fold_in(key, number), 3)
      noise, made, _ = _drawn(config, nets, params, model_state, part['label'], draw, only_noise=name == 'generator')
      full = {**part, 'noise': noise, 'made': made, 'key': mark}
      # Factors are renewed at the first of several steps.
      first = number in (0, count)
      params, model_state, opt_state, grads[name], found = moved(
        name, params, model_state, opt_state, full, own, statistics and first, refresh and first
      )
      metrics |= found
    norms = guard.norms({name: grads[name] for name in NAMES})
    judged = guard.judge(config, state.guard, metrics['loss'] + metrics['generator_loss'], norms, finite)
    new = state._replace(params=params, model_state=model_state, opt_state=opt_state)
    if config.recipe.average:
      new = new._replace(average=recipe.averaged(state.average, params, state.step, config.recipe.average))
    new = guard.chosen(judged.apply, new, state)._replace(guard=judged)
    new = new._replace(step=state.step + jnp.where(judged.held, 0, 1))
    return new, {**metrics, 'finite_input': finite, 'held': judged.held, 'gradient_norms': norms}

  return step


def _drawn(
  config: Any, nets: Networks, params: Any, model_state: Any, label: Array, key: Array, only_noise: bool = False
) -> tuple[Array, Array, Array]:
  """Noise, images made of it (zeros, where they are not wanted), and another key."""
  draw, key = jax.random.split(key)
  noise = jax.random.normal(draw, (len(label), config.model.latent))
  size = config.model.size
  if only_noise:
    return noise, jnp.zeros((len(label), size, size, config.model.channels)), key
  state = model_state['generator']
  made, _ = nets.generator.apply({'params': params['generator'], **state}, noise, label, True, mutable=list(state))
  return noise, jax.lax.stop_gradient(made), key


def _generate(net: models.Generator, averaged: bool, state: TrainState, key: Array, label: Array) -> Array:
  """Images of the classes, by the averaged generator if there is one, with the means of its norms."""
  params = (state.average if averaged else state.params)['generator']
  noise = jax.random.normal(key, (len(label), net.latent))
  return net.apply({'params': params, **state.model_state['generator']}, noise, label, train=False)


def _on_mesh(fn: Callable, rules: parallel.Rules, mesh: Mesh) -> Callable:
  @functools.wraps(fn)
  def sharded(*args: Any) -> Any:
    with parallel.logical_axes(rules, mesh):
      return fn(*args)

  return sharded


def check_batch(config: Any, mesh: Mesh, shape: tuple[int, ...], strips: parallel.Strips) -> None:
  """Raises ConfigError for images of another shape than the config's, or a batch that does not divide."""
  wanted = (config.model.size, config.model.size, config.model.channels)
  if shape != wanted:
    raise ConfigError(f'images of {config.data.name} are {shape}; config.model makes {wanted}')
  steps = config.gan.discriminator_steps
  if strips or config.data.batch_size % (steps * parallel.batch_shards(mesh)):
    raise ConfigError(
      f'two players take batches that divide over data and fsdp: batch_size={config.data.batch_size} in {steps} parts '
      f'(gan.discriminator_steps) on {config.mesh}'
    )


def check(config: Any) -> None:
  """Raises ConfigError for options that two players do not have."""
  for name, value, none in (
    ('microbatches', config.microbatches, 1),
    ('recipe.mixup', config.recipe.mixup, 0),
    ('recipe.cutmix', config.recipe.cutmix, 0),
    ('recipe.loss_scale', config.recipe.loss_scale, 0),
    ('gradients.all_reduce', config.gradients.all_reduce, 'auto'),
  ):
    if value != none:
      raise ConfigError(f'config.{name}={value!r} does not go with config.task={TASK!r}; set it to {none!r}')
  for name in ('not_finite', 'spike'):
    if config.faults[name] == 'damp':
      raise ConfigError(f"config.faults.{name}='damp' does not go with config.task={TASK!r}; set it to 'skip'")
  for name in ('target', 'keep_best'):
    if config[name] and not config.gan.judge:
      raise ConfigError(
        f"config.{name}={config[name]} needs a score, and the discriminator's loss is none: name a finished classifier by "
        'config.gan.judge'
      )
