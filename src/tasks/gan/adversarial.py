"""A generator and a discriminator trained against each other, each with its optimiser, in one sharded step.

A batch has inputs (b, h, w, c) and label (b,); at evaluation it also has `mask` (b,). `_deal` adds what a player's loss
takes beside them: noise (b, latent), made (b, h, w, c), images of the generator, and key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ... import kron, models, parallel
from ...train import masked
from ...train.errors import ConfigError
from ...train.inputs import Data
from ...train.players import Game
from ...train.steps import TrainState
from ...train.task import Task
from .judge import Judge, read_judge
from .networks import TASK, Networks, grid, networks
from .players import NAMES, config_of

Batch = dict[str, Array]


def make_task(config: Any, parts: int = 1) -> Task:
  """Makes the task of a run with two players.

  Its score is the share of images to which a judge gives the class asked for, or the loss if there is no judge.

  Raises:
    ConfigError: the config has settings that do not work with two players.
  """
  del parts
  check(config)
  judged, nets = bool(config.gan.judge), networks(config)
  loss = functools.partial(_both_losses, config, nets, losses(nets, tuple(config.gan.augment)))
  game = functools.partial(make_game, config, nets)
  return Task(nets, loss, 'agreement' if judged else 'loss', not judged, game=game)


def hinge(real: Float[Array, ' b'], fake: Float[Array, ' b']) -> Float[Array, '']:
  """Returns the discriminator's loss (Lim and Ye 2017, arXiv:1705.02894, eq. 8); the generator's is -mean(fake)."""
  return nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()


def losses(nets: Networks, policy: tuple[str, ...]) -> dict[str, Callable]:
  """Returns the loss of each player, by name.

  A loss is (params, (own state, the other's variables), batch) -> (loss, (metrics, own new state)). It observes the
  discriminator's output as that of a Gaussian: K-FAC measures a step of either player by how far this output moves.
  """
  generator, discriminator = nets

  def applied(net, params, state, *args):
    out, new = net.apply({'params': params, **state}, *args, train=True, mutable=list(state))
    return out, new

  def of_discriminator(params, context, batch):
    state, _ = context
    pairs = jnp.stack([batch['inputs'], batch['made']], 1)  # paired by example, so that both are sharded like the batch
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
  """Returns R1: half the mean squared gradient of the discriminator at real images (Mescheder et al. 2018, eq. 9)."""

  def total(images):
    return net.apply(variables, models.augment(images, batch['key'], policy), batch['label'], train=False).sum()

  return 0.5 * (jax.grad(total)(batch['inputs']) ** 2).sum((1, 2, 3)).mean()


OTHER = {'generator': 'discriminator', 'discriminator': 'generator'}


def make_game(config: Any, nets: Networks, data: Data, mesh: Mesh) -> Game:
  """Makes the game of both players on a mesh.

  Raises:
    ConfigError: there is no such judge, the images have another shape than the config's, or the batch does not divide.
  """
  check_batch(config, mesh, data.like['inputs'].shape[1:], data.strips)
  judge = read_judge(config.gan.judge) if config.gan.judge else None
  example, policy, count = examples(config), tuple(config.gan.augment), config.gan.discriminator_steps
  on_mesh = functools.partial(_on_mesh, rules=parallel.RULES['gan'], mesh=mesh)
  generate = on_mesh(functools.partial(_generate, nets.generator, bool(config.recipe.average)))
  labels = jnp.arange(config.model.classes).repeat(config.model.classes)
  pictures = jax.jit(lambda state: generate(state, jax.random.key(0), labels), out_shardings=parallel.replicated(mesh))
  return Game(
    turns=('discriminator',) * count + ('generator',),
    parts=count,
    losses={name: on_mesh(fn) for name, fn in losses(nets, policy).items()},
    variables=functools.partial(_variables, nets, example),
    example=example,
    context=context_of,
    config_of=functools.partial(config_of, config),
    deal=functools.partial(_deal, (config, nets)),
    added=functools.partial(_added, config, nets, policy),
    total=lambda metrics: metrics['loss'] + metrics['generator_loss'],
    evaluate=functools.partial(_evaluate, config, nets.discriminator, generate, judge),
    draw=lambda state: (255 * grid(np.asarray(pictures(state)), config.model.classes)).round().astype(np.uint8),
  )


def context_of(name: str, params: Any, states: Any) -> tuple[Any, dict[str, Any]]:
  """Returns what a player's loss takes beside its parameters: its own state, and the other player's variables."""
  other = OTHER[name]
  return states[name], {'params': params[other], **states[other]}


def _deal(
  setting: tuple[Any, Networks], name: str, params: Any, states: Any, batch: Batch, draw: Array, mark: Array
) -> tuple[Any, Batch]:
  noise, made, _ = _drawn(*setting, params, states, batch['label'], draw, only_noise=name == 'generator')
  return context_of(name, params, states), {**batch, 'noise': noise, 'made': made, 'key': mark}


def _added(
  config: Any, nets: Networks, policy: tuple[str, ...], name: str, params: Any, states: Any, batch: Batch
) -> Any:
  """Returns the gradient of the discriminator's penalty, or None for the generator or without a penalty."""
  if name != 'discriminator' or not config.gan.r1:
    return None
  variables = lambda p: {'params': p, **states[name]}  # noqa: E731
  slopes = jax.grad(lambda p: penalty(nets.discriminator, variables(p), batch, policy))(params[name])
  return jax.tree.map(lambda s: config.gan.r1 * s, slopes)


def examples(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes that a player sees in one step.

  They are those of a part of the batch, images made for its labels, and the noise from which these are made.
  """
  settings, each = config.model, config.data.batch_size // config.gan.discriminator_steps
  image = jax.ShapeDtypeStruct((each, settings.size, settings.size, settings.channels), jnp.float32)
  return {
    'inputs': image,
    'made': image,
    'label': jax.ShapeDtypeStruct((each,), jnp.int32),
    'noise': jax.ShapeDtypeStruct((each, settings.latent), jnp.float32),
    'key': jax.eval_shape(lambda: jax.random.key(0)),
  }


def _variables(nets: Networks, like: dict[str, jax.ShapeDtypeStruct], name: str, key: Array) -> Any:
  first = jnp.zeros(like['noise' if name == 'generator' else 'inputs'].shape)
  return getattr(nets, name).init(key, first, jnp.zeros(like['label'].shape, jnp.int32), train=True)


def _evaluate(
  config: Any,
  net: models.Discriminator,
  generate: Callable,
  judge: Judge | None,
  state: TrainState,
  batch: Batch,
) -> dict[str, Array]:
  # Every batch has different noise, from a fixed key (a built run may be trained with several seeds) and its content.
  key = jax.random.fold_in(jax.random.key(0), (1e3 * batch['inputs'].mean()).astype(jnp.uint32))
  made = generate(state, key, batch['label'])
  variables = {'params': state.params['discriminator'], **state.model_state['discriminator']}
  real, fake = (net.apply(variables, images, batch['label'], train=False) for images in (batch['inputs'], made))
  metrics = {'loss': nn.relu(1 - real) + nn.relu(1 + fake), 'real': real, 'made': fake}
  if judge is not None:
    metrics['agreement'] = judge.logits(made).argmax(-1) == batch['label']
  return {**{k: masked.mean(v, batch) for k, v in metrics.items()}, 'examples': batch['mask'].sum()}


def _both_losses(
  config: Any,
  nets: Networks,
  loss: dict[str, Callable],
  params: Any,
  model_state: Any,
  batch: Batch,
  train: bool = True,
) -> Any:
  """Returns the sum of both losses, for the search for a fault."""
  del train
  noise, made, key = _drawn(config, nets, params, model_state, batch['label'], jax.random.key(0))
  full = {**batch, 'noise': noise, 'made': made, 'key': key}
  total = sum(loss[name](params[name], context_of(name, params, model_state), full)[0] for name in NAMES)
  return total, ({'loss': total}, model_state)


def _drawn(
  config: Any, nets: Networks, params: Any, model_state: Any, label: Array, key: Array, only_noise: bool = False
) -> tuple[Array, Array, Array]:
  """Returns noise, images made from it (zeros if only the noise is wanted), and another key."""
  draw, key = jax.random.split(key)
  noise = jax.random.normal(draw, (len(label), config.model.latent))
  size = config.model.size
  if only_noise:
    return noise, jnp.zeros((len(label), size, size, config.model.channels)), key
  state = model_state['generator']
  made, _ = nets.generator.apply({'params': params['generator'], **state}, noise, label, True, mutable=list(state))
  return noise, jax.lax.stop_gradient(made), key


def _generate(net: models.Generator, averaged: bool, state: TrainState, key: Array, label: Array) -> Array:
  """Makes images of the classes with the stored means of norms, by the averaged generator if there is one."""
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
  """Raises ConfigError if images have another shape than the config's, or if the batch does not divide."""
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
  """Raises ConfigError for options that do not work with two players."""
  for name, value, none in (
    ('microbatches', config.microbatches, 1),
    ('recipe.mixup', config.recipe.mixup, 0),
    ('recipe.cutmix', config.recipe.cutmix, 0),
    ('recipe.loss_scale', config.recipe.loss_scale, 0),
    ('gradients.all_reduce', config.gradients.all_reduce, 'auto'),
  ):
    if value != none:
      raise ConfigError(f'config.{name}={value!r} does not work with config.task={TASK!r}; set it to {none!r}')
  for name in ('not_finite', 'spike'):
    if config.faults[name] == 'damp':
      raise ConfigError(f"config.faults.{name}='damp' does not work with config.task={TASK!r}; set it to 'skip'")
  for name in ('target', 'keep_best'):
    if config[name] and not config.gan.judge:
      raise ConfigError(
        f"config.{name}={config[name]} needs a score, and the discriminator's loss is none: name a finished classifier by "
        'config.gan.judge'
      )
