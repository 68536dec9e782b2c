"""Images of a trained generator: made, filtered, mixed with real ones, and learnt from."""

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

from experiments.checkpoints import load_export
from experiments.errors import ConfigError
from experiments.judge import Judge, in_batches, read_judge
from experiments.networks import TASK, grid, networks
from kronmesh import data, models, parallel
from kronmesh.models.gan import MOMENTUM

_MADE = 0x6D616465  # folded into the keys of made images


class Generator(NamedTuple):
  """make: of noise (b, latent) and classes (b), images (b, h, w, c)."""

  config: Any
  make: Any
  step: int


def read_generator(run: str | Path) -> Generator:
  """The generator of a finished run, its norms' means and variances renewed.

  Those that the run ends with are of its last parameters; the exported ones are an average over many steps. So they are
  taken anew from images of these, with the norms of batches (Brock et al. 2019, appendix C: standing statistics).

  Raises:
    ConfigError: there is none.
  """
  variables, about = load_export(Path(run) / 'export')
  config = ConfigDict(about['config'])
  if config.task != TASK:
    raise ConfigError(f'{run} is a run of {config.task!r}; a generator is one of {TASK!r}')
  net = networks(config).generator
  own = standing(net, {'params': variables['params']['generator'], **variables['generator']})
  return Generator(config, jax.jit(functools.partial(net.apply, own)), about['step'])


def standing(net: models.Generator, variables: dict[str, Any], passes: int = 48) -> dict[str, Any]:
  """The variables, with means and variances of norms, and vectors of spectral norms, of their own parameters."""
  params, state = variables['params'], {k: v for k, v in variables.items() if k != 'params'}
  state['batch_stats'] = jax.tree.map(jnp.zeros_like, state['batch_stats'])  # passes do not read them
  label = jnp.arange(20 * net.classes) % net.classes

  def again(state: dict[str, Any], key: Any) -> tuple[dict[str, Any], None]:
    noise = jax.random.normal(key, (len(label), net.latent))
    return net.apply({'params': params, **state}, noise, label, train=True, mutable=list(state))[1], None

  keys = jax.random.split(jax.random.key(_MADE), passes)
  found = jax.jit(lambda state: jax.lax.scan(again, state, keys)[0])(state)
  found['batch_stats'] = jax.tree.map(lambda x: x / (1 - MOMENTUM**passes), found['batch_stats'])
  return {'params': params, **found}


def images(
  generator: Generator,
  count: int,
  seed: int,
  judge: Judge | None = None,
  keep: float = 0.0,
  label: Int[np.ndarray, ' n'] | None = None,
  batch: int = 500,
) -> data.Arrays:
  """So many images, of all classes in turn or of these.

  judge, keep: only images are taken to whose own class the judge gives at least this probability; others are made anew, ten
    times at most, after which the best that there was is taken.
  """
  classes = generator.config.model.classes
  label = np.arange(count) % classes if label is None else label
  found = []
  for first in range(0, count, batch):
    wanted = label[first : first + batch]
    padded = np.resize(wanted, batch)  # one shape, one program
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
    found.append(best[: len(wanted)])
  return data.Arrays(np.concatenate(found), np.asarray(label, np.int32))


def sheet(generator: Generator) -> UInt8[np.ndarray, 'H W']:
  """A row of samples for each class."""
  classes = generator.config.model.classes
  made = images(generator, classes * classes, 1, label=np.arange(classes).repeat(classes))
  found = (255 * grid(made.image, classes)).round().astype(np.uint8)
  return found[..., 0] if found.shape[-1] == 1 else found


def classified(train: data.Arrays, test: data.Arrays, folder: Path, steps: int, seed: int = 0) -> float:
  """The accuracy on test images of a convolutional network trained on these; the folder gets the arrays and the run."""
  from experiments.configs import fashion_mnist_resnet
  from experiments.train import train as train_run

  data.write_arrays(train, folder / 'arrays/train.npz')
  data.write_arrays(test, folder / 'arrays/test.npz')
  config = fashion_mnist_resnet.get_config('small')
  config.model.width = 16
  config.data.update({'name': 'arrays', 'source': str(folder / 'arrays'), 'batch_size': min(256, len(train.label))})
  config.data.update({'eval_batch_size': 1000, 'eval_examples': 0})
  config.update({'steps': steps, 'eval_every': steps, 'seed': seed, 'keep_checkpoints': 0, 'health_every': 0})
  return train_run(config, folder / 'run', quiet=True)[-1]['eval_accuracy']


def fill(config: Any, mesh: Mesh, shape: tuple[int, ...], strips: parallel.Strips) -> Callable | None:
  """(a batch on the mesh, the seed, its number) -> the batch with a share of made images; None where none are wanted.

  It is dispatched when the batch is made, ahead of the step that trains on it, and runs sharded as the batch is: each shard
  makes its own. Where a judge is named, an image is made anew until the judge gives its own class the probability `keep`;
  after so many `tries` the one that it takes for its class most is kept.

  Raises:
    ConfigError: no such runs, another number of classes or shape of images, or what they do not go with.
  """
  own, size = config.generated, config.data.batch_size
  if not own.run:
    return None
  if config.task != 'classify' or strips:
    what = (
      f'--config.mesh={config.mesh}, which divides images'
      if strips
      else f"config.task={config.task!r}: 'classify' does"
    )
    raise ConfigError(f'config.generated.run does not go with {what}')
  generator = read_generator(own.run)
  judge = read_judge(own.judge) if own.judge else None
  model, shards = generator.config.model, parallel.batch_shards(mesh)
  made = round(own.share * size / shards)  # of each shard
  if not 0 < made <= size // shards:
    what = 'none; raise it' if made <= 0 else 'more than all; it is at most 1'
    raise ConfigError(f'config.generated.share={own.share:g} of {size} examples on {shards} shards is {what}')
  if config.model.get('classes', 0) != model.classes:
    raise ConfigError(
      f'{own.run} makes images of {model.classes} classes; config.model.classes={config.model.get("classes", 0)}'
    )
  of_generator = (model.size, model.size, model.channels)
  if shape != of_generator:
    raise ConfigError(f'{own.run} makes images of {of_generator}; those of {config.data.name} are {shape}')
  lying, tries = parallel.batch_sharding(mesh, size), max(own.tries, 1) if judge is not None else 1

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
      better = (surer > chance) & (chance < own.keep)
      image = jnp.where(better[:, None, None, None], other, image)
      chance = jnp.where(better, surer, chance)

    def beside(real: Any, new: Any) -> Any:
      real, new = (x.reshape(shards, -1, *x.shape[1:]) for x in (real, new))
      both = jnp.concatenate([new.astype(real.dtype), real[:, made:]], 1)
      return both.reshape(-1, *both.shape[2:])

    return {**batch, 'image': beside(batch['image'], image), 'label': beside(batch['label'], label)}

  return filled
