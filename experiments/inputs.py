"""Batches of a config's data, on its mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments import processes
from experiments.errors import ConfigError
from kronmesh import data, parallel


def make_data(config: Any, mesh: Mesh) -> tuple[Callable, Callable, dict[str, jax.ShapeDtypeStruct]]:
  """Two functions that return iterators of batches on the mesh, and the shapes of a training batch.

  The first is of the seed and the first batch's number; the second one's make one pass of the evaluation set. On a mesh
  along which images lie in strips, those shapes are of whole images; batches have the padding that makes strips equal, and
  a process loads its own strips alone.
  """
  own = config.data
  train_size, eval_size = own.batch_size, own.eval_batch_size or own.batch_size
  train_sharding = parallel.batch_sharding(mesh, train_size)
  eval_sharding = parallel.batch_sharding(mesh, eval_size, 'eval_batch_size')
  shard, eval_shard = parallel.local_part(train_sharding, train_size), parallel.local_part(eval_sharding, eval_size)
  threads = 1  # of arrays in memory; more would wait for each other
  if own.name in data.LAYOUTS:
    threads = 8
    where = data.data_dir(own.folder)
    with processes.chief_first():
      prepared = data.prepared(own.name, own.source, where, rate=own.rate, short_side=own.short_side)
    if not {'train', own.eval_split} <= set(prepared.info.splits):
      raise ConfigError(f'{own.name} has the splits {", ".join(prepared.info.splits)}, not train and {own.eval_split}')
    source, split = (prepared.as_data_source(s) for s in ('train', own.eval_split))
    _check_classes(source, config)
    settings = {'frames': own.frames or 16, 'every': own.every, 'size': own.image_size}
    like = {'image': ((settings['frames'], own.image_size, own.image_size, 3), np.float32), 'label': ((), np.int32)}
    held_out = data.clip_batches(split, eval_size, train=False, shard=eval_shard, **settings)

    def train(seed: int) -> Any:
      changes = {'flip': own.flip, 'colour': own.colour}
      return data.clip_batches(source, train_size, seed=seed, train=True, shard=shard, **settings, **changes)
  elif own.name not in (*data.IN_MEMORY, *data.SCENES, 'noise'):
    threads = 8
    source, split = (data.record_source(own.name, s, folder=own.folder) for s in ('train', own.eval_split))
    _check_classes(source, config)
    like = {'image': ((own.image_size, own.image_size, 3), np.float32), 'label': ((), np.int32)}
    held_out = data.record_batches(split, eval_size, seed=0, train=False, size=own.image_size, shard=eval_shard)

    def train(seed: int) -> Any:
      return data.record_batches(source, train_size, seed=seed, train=True, size=own.image_size, shard=shard)
  else:
    with processes.chief_first():
      arrays, split = (_arrays(config, s) for s in ('train', own.eval_split))
    augment = data.shift_and_flip if own.augment else None
    if own.eval_examples:
      split = data.Arrays(*(x[: own.eval_examples] for x in split))
    like = {name: (x.shape[1:], x.dtype) for name, x in arrays._asdict().items()}
    held_out = data.ordered_batches(split, eval_size, shard=eval_shard)

    def train(seed: int) -> Any:
      return data.array_batches(arrays, train_size, seed=seed, augment=augment, shard=shard)

  like = {name: jax.ShapeDtypeStruct((train_size, *shape), dtype) for name, (shape, dtype) in like.items()}
  strips = parallel.image_strips(mesh, like['image'].shape)
  ndim = len(like['image'].shape)
  image = parallel.image_sharding(mesh, train_size, strips, ndim)
  rows = parallel.local_rows(image, like['image'].shape, strips)

  def own_strips(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, 'image': parallel.cut(batch['image'], rows)}

  def streamed(batches: Any, start: int, sharding: NamedSharding, size: int) -> Iterator[dict[str, jax.Array]]:
    # Cut where it was made, so that what waits is what is needed.
    for batch in data.stream(batches.map(own_strips) if strips else batches, start, threads):
      found = {}
      for name, x in batch.items():
        where = parallel.image_sharding(mesh, size, strips, ndim) if name == 'image' else sharding
        shape = (size, *x.shape[1:])
        whole = parallel.padded_shape((size, *like['image'].shape[1:]), strips) if name == 'image' else shape
        found[name] = jax.make_array_from_process_local_data(where, x, whole)
      yield found

  def train_batches(seed: int, start: int) -> Iterator[dict[str, jax.Array]]:
    return streamed(train(seed), start, train_sharding, train_size)

  return train_batches, lambda: streamed(held_out, 0, eval_sharding, eval_size), like


def _check_classes(source: Any, config: Any) -> None:
  own, classes = config.data, data.class_count(source)
  if classes and classes != config.model.get('classes', 0):
    raise ConfigError(f'{own.name} in {own.folder} has {classes} classes; set --config.model.classes={classes}')


def _arrays(config: Any, split: str) -> data.Arrays:
  own = config.data
  if own.name == 'noise':
    if not own.shape:
      raise ConfigError("config.data.name='noise' needs config.data.shape: that of an example")
    classes = config.model.get('classes', 0) or config.model.get('vocabulary', 1)
    return data.noise(own.shape, classes, own.batch_size, tokens=config.task == 'next_token')
  if own.name in data.SCENES:
    scenes = data.shrunken(data.load_scenes(own.name, split, folder=own.folder, source=own.source), own.short_side)
    return data.windows(scenes, own.frames or 8, own.every, balanced=split == 'train')
  arrays = data.load_arrays(own.name, split, folder=own.folder, source=own.source)
  if not own.frames:
    return arrays
  if arrays.image.ndim != 5 or own.frames > arrays.image.shape[1]:
    raise ConfigError(f'config.data.frames={own.frames}: examples of {own.name} are {arrays.image.shape[1:]}')
  start = (arrays.image.shape[1] - own.frames) // 2
  return arrays._replace(image=arrays.image[:, start : start + own.frames])
