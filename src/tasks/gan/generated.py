"""Images of a trained generator, which are made, filtered, and mixed with real ones for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from ... import data, models, parallel
from ...models.gan import MOMENTUM
from ...train.checkpoints import load_export
from ...train.errors import ConfigError
from .judge import Judge, in_batches, read_judge
from .networks import TASK, grid, networks

_MADE = 0x6D616465  # folded into the keys of made images


class Generator(NamedTuple):
  """A trained generator. make: (noise (b, latent), classes (b)) -> images (b, h, w, c)."""

  config: Any
  make: Any
  step: int


def read_generator(run: str | Path) -> Generator:
  """Reads the generator of a finished run, and renews the means and variances of its norms.

  The run ends with those of its last parameters, but the exported parameters are an average over many steps. So they
  are measured again from images of the exported parameters, with norms over batches (Brock et al. 2019, appendix C:
  standing statistics).

  Raises:
    ConfigError: the run has no export, or is not a generator's.
  """
  variables, about = load_export(Path(run) / 'export')
  config = ConfigDict(about['config'])
  if config.task != TASK:
    raise ConfigError(f'{run} is a run of {config.task!r}; a generator is a run of {TASK!r}')
  net = networks(config).generator
  generator = standing(net, {'params': variables['params']['generator'], **variables['generator']})
  return Generator(config, jax.jit(functools.partial(net.apply, generator)), about['step'])


def standing(net: models.Generator, variables: dict[str, Any], passes: int = 48) -> dict[str, Any]:
  """Returns the variables with statistics measured for their parameters.

  The statistics are the means and variances of norms, and the vectors of spectral norms.
  """
  params, state = variables['params'], {k: v for k, v in variables.items() if k != 'params'}
  state['batch_stats'] = jax.tree.map(jnp.zeros_like, state['batch_stats'])  # the passes do not read these
  label = jnp.arange(20 * net.classes) % net.classes

  def again(state: dict[str, Any], key: Any) -> tuple[dict[str, Any], None]:
    noise = jax.random.normal(key, (len(label), net.latent))
    return net.apply({'params': params, **state}, noise, label, train=True, mutable=list(state))[1], None

  keys = jax.random.split(jax.random.key(_MADE), passes)
  state_after = jax.jit(lambda state: jax.lax.scan(again, state, keys)[0])(state)
  state_after['batch_stats'] = jax.tree.map(lambda x: x / (1 - MOMENTUM**passes), state_after['batch_stats'])
  return {'params': params, **state_after}


def images(
  generator: Generator,
  count: int,
  seed: int,
  judge: Judge | None = None,
  keep: float = 0.0,
  label: Int[np.ndarray, ' n'] | None = None,
  batch: int = 500,
) -> data.Arrays:
  """Makes `count` images, of all classes in turn or of those in `label`.

  judge, keep: accept only images to whose own class the judge gives at least the probability `keep`. Other images are
    made again, in at most ten attempts, of which the best is then taken.
  """
  classes = generator.config.model.classes
  label = np.arange(count) % classes if label is None else label
  pictures = []
  for first in range(0, count, batch):
    wanted = label[first : first + batch]
    padded = np.resize(wanted, batch)  # one shape needs only one program
    best, sure = None, np.full(batch, -1.0)
    for attempt in range(10 if judge is not None and keep else 1):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), first), attempt)
      made = np.asarray(generator.make(jax.random.normal(key, (batch, generator.config.model.latent)), padded))
      if judge is None or not keep:
        best = made
        break
      chances = jax.nn.softmax(in_batches(judge.logits, made, batch))[np.arange(batch), padded]
      better = np.asarray(chances) > np.where(sure >= keep, np.inf, sure)
      best = made if best is None else np.where(better[:, None, None, None], made, best)
      sure = np.where(better, chances, sure)
      if (sure >= keep).all():
        break
    pictures.append(best[: len(wanted)])
  return data.Arrays(np.concatenate(pictures), np.asarray(label, np.int32))


def sheet(generator: Generator) -> UInt8[np.ndarray, 'H W']:
  """Makes a sheet with a row of samples for each class."""
  classes = generator.config.model.classes
  made = images(generator, classes * classes, 1, label=np.arange(classes).repeat(classes))
  pixels = (255 * grid(made.inputs, classes)).round().astype(np.uint8)
  return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def fill(config: Any, mesh: Mesh, shape: tuple[int, ...], strips: parallel.Strips) -> Callable | None:
  """Returns a function that puts a share of made images into a batch, or None if none are wanted.

  The function takes a batch on the mesh, the seed and the batch's number. It is dispatched when the batch is made,
  ahead of the step that trains on it, and is sharded like the batch: each shard makes its own images. If a judge is
  named, an image is made again until the judge gives its own class the probability `keep`. After `tries` attempts, the
  image with the highest probability of its class is kept.

  Raises:
    ConfigError: the runs do not exist, the number of classes or the shape of images differs, or the config has
      something that made images do not go with.
  """
  settings, size = config.generated, config.data.batch_size
  if not settings.run:
    return None
  if config.task != 'classify' or strips:
    what = (
      f'--config.mesh={config.mesh}, which divides images'
      if strips
      else f"config.task={config.task!r}: 'classify' does"
    )
    raise ConfigError(f'config.generated.run does not work with {what}')
  generator = read_generator(settings.run)
  judge = read_judge(settings.judge) if settings.judge else None
  model, shards = generator.config.model, parallel.batch_shards(mesh)
  made = round(settings.share * size / shards)  # images per shard
  if not 0 < made <= size // shards:
    what = 'none; raise it' if made <= 0 else 'more than all; it is at most 1'
    raise ConfigError(f'config.generated.share={settings.share:g} of {size} examples on {shards} shards is {what}')
  if config.model.get('classes', 0) != model.classes:
    raise ConfigError(
      f'{settings.run} makes images of {model.classes} classes; config.model.classes={config.model.get("classes", 0)}'
    )
  of_generator = (model.size, model.size, model.channels)
  if shape != of_generator:
    raise ConfigError(f'{settings.run} makes images of {of_generator}; those of {config.data.name} are {shape}')
  lying, tries = parallel.batch_sharding(mesh, size), max(settings.tries, 1) if judge is not None else 1

  def one(key: Any, label: Any) -> tuple[Any, Any]:
    noise = jax.random.normal(key, (len(label), model.latent))
    images = generator.make(noise, label)
    chance = jax.nn.softmax(judge.logits(images)) if judge is not None else jnp.ones((len(label), model.classes))
    return images, jnp.take_along_axis(chance, label[:, None], 1)[:, 0]

  @functools.partial(jax.jit, out_shardings=lying)
  def filled(batch: dict[str, Any], seed: Any, number: Any) -> dict[str, Any]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _MADE), number)
    key, of_labels = jax.random.split(key)
    label = jax.random.randint(of_labels, (shards * made,), 0, model.classes)
    label = jax.lax.with_sharding_constraint(label, parallel.batch_sharding(mesh, shards * made))
    image, chance = one(jax.random.fold_in(key, 0), label)
    for attempt in range(1, tries):
      other, surer = one(jax.random.fold_in(key, attempt), label)
      better = (surer > chance) & (chance < settings.keep)
      image = jnp.where(better[:, None, None, None], other, image)
      chance = jnp.where(better, surer, chance)

    def beside(real: Any, new: Any) -> Any:
      real, new = (x.reshape(shards, -1, *x.shape[1:]) for x in (real, new))
      both = jnp.concatenate([new.astype(real.dtype), real[:, made:]], 1)
      return both.reshape(-1, *both.shape[2:])

    return {**batch, 'inputs': beside(batch['inputs'], image), 'label': beside(batch['label'], label)}

  return filled
