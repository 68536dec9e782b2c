"""Batches of a config's data, on its mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from experiments import processes
from experiments.errors import ConfigError
from experiments.generated import fill
from experiments.graphs import kinds, known_graph
from kronmesh import data, parallel

DIRECTIONS = ('moving_fashion_mnist', 'directed_motion')  # sets whose clips are of another class in a mirror


class Source(NamedTuple):
  """A config's data, on no mesh yet.

  like: shape and type of an example's arrays.
  train: (seed, shard, rows) -> endless batches. held_out: (shard, rows) -> one pass of the evaluation set.
  threads: that make batches.
  by_rows: whether images come with these rows alone; else they are cut from whole ones.
  """

  like: dict[str, tuple[tuple[int, ...], Any]]
  train: Callable[[int, tuple[int, int], tuple[int, int] | None], Any]
  held_out: Callable[[tuple[int, int], tuple[int, int] | None], Any]
  threads: int
  by_rows: bool = False


def make_data(
  config: Any, mesh: Mesh, load: bool = True
) -> tuple[Callable, Callable, dict[str, jax.ShapeDtypeStruct], parallel.Strips]:
  """Two functions that return iterators of batches on the mesh, the shapes of a training batch, and its images' strips.

  The first is of the seed and the first batch's number; the second one's make one pass of the evaluation set. Shapes are of
  whole images; batches have the padding that makes strips equal, and a process loads its own strips alone.

  load: False where shapes are enough: data that need not be read for those are not.
  """
  own = config.data
  train_size, eval_size = own.batch_size, own.eval_batch_size or own.batch_size
  train_sharding = parallel.batch_sharding(mesh, train_size)
  eval_sharding = parallel.batch_sharding(mesh, eval_size, 'eval_batch_size')
  shard, eval_shard = parallel.local_part(train_sharding, train_size), parallel.local_part(eval_sharding, eval_size)
  source = _source(config, load)
  like = {name: jax.ShapeDtypeStruct((train_size, *shape), dtype) for name, (shape, dtype) in source.like.items()}
  example = like['image'].shape[1:]
  strips = parallel.image_strips(mesh, like['image'].shape)
  images = lambda size: parallel.image_sharding(mesh, size, strips, 1 + len(example))  # noqa: E731
  rows = parallel.local_rows(images(train_size), like['image'].shape, strips)

  height = len(like['image'].shape) - 3
  there = rows[height][rows[height] >= 0] if height in rows and source.by_rows else None
  wanted = None if there is None else (int(there[0]), int(there[-1]) + 1)
  if wanted not in (None, (0, like['image'].shape[height])) and own.colour:
    raise ConfigError(
      f'config.data.colour={own.colour} changes whole clips, and a process loads some of their rows: set it to 0'
    )
  if wanted is not None:  # they come with these rows alone
    rows[height] = np.where(rows[height] < 0, -1, rows[height] - wanted[0])

  def own_strips(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, 'image': parallel.cut(batch['image'], rows)}

  def streamed(batches: Any, start: int, sharding: NamedSharding, size: int) -> Iterator[dict[str, jax.Array]]:
    whole = parallel.padded_shape((size, *example), strips)
    # Cut where it was made, so that what waits is what is needed.
    for batch in data.stream(batches.map(own_strips) if strips else batches, start, source.threads):
      yield {
        name: jax.make_array_from_process_local_data(images(size), x, whole)
        if name == 'image'
        else jax.make_array_from_process_local_data(sharding, x)
        for name, x in batch.items()
      }

  filled = fill(config, mesh, example, strips) if load else None

  def train_batches(seed: int, start: int) -> Iterator[dict[str, jax.Array]]:
    batches = streamed(source.train(seed, shard, wanted), start, train_sharding, train_size)
    if filled is None:
      return batches
    return ahead(filled(batch, seed, np.uint32(number)) for number, batch in enumerate(batches, start))

  return train_batches, lambda: streamed(source.held_out(eval_shard, wanted), 0, eval_sharding, eval_size), like, strips


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
  """The same, each asked for when the one before it is taken."""
  waiting = next(batches)
  for following in batches:
    yield waiting
    waiting = following
  yield waiting


def _source(config: Any, load: bool) -> Source:
  name = config.data.name
  if name in data.LAYOUTS:
    return _videos(config, load)
  if name == 'noise':
    return _noise(config)
  if name in (*data.OF_PYKEEN, 'triples', 'wordnet'):
    return _links(config)
  if name in (*data.IN_MEMORY, *data.SCENES, 'directed_motion'):
    return _in_memory(config)
  return _records(config, load)


def _videos(config: Any, load: bool) -> Source:
  own = config.data
  size = own.image_size, own.image_width or own.image_size
  settings = {'frames': own.frames or 16, 'every': own.every, 'size': size, 'bands': own.bands}
  like = {'image': ((settings['frames'], *size, 3), np.float32), 'label': ((), np.int32)}
  if not load:
    return Source(like, _nothing, _nothing, 1)
  where = data.data_dir(own.folder)
  with processes.chief_first():
    prepared = data.prepared(own.name, own.source, where, rate=own.rate, short_side=own.short_side, bands=own.bands)
  if not {'train', own.eval_split} <= set(prepared.info.splits):
    raise ConfigError(f'{own.name} has the splits {", ".join(prepared.info.splits)}, not train and {own.eval_split}')
  source, split = (prepared.as_data_source(s) for s in ('train', own.eval_split))
  _check_classes(prepared.info.features['label'].num_classes, config)
  changes = {'flip': own.flip, 'colour': own.colour}
  clips = functools.partial(data.clip_batches, **settings)
  return Source(
    like,
    lambda seed, shard, rows: clips(source, own.batch_size, seed=seed, train=True, shard=shard, rows=rows, **changes),
    lambda shard, rows: clips(split, own.eval_batch_size or own.batch_size, train=False, shard=shard, rows=rows),
    8,
    by_rows=True,
  )


def _records(config: Any, load: bool) -> Source:
  own = config.data
  like = {'image': ((own.image_size, own.image_size, 3), np.float32), 'label': ((), np.int32)}
  if not load:
    return Source(like, _nothing, _nothing, 1)
  found = {s: data.record_source(own.name, s, folder=own.folder) for s in ('train', own.eval_split)}
  source, split = found['train'], found[own.eval_split]
  if not source.labelled and config.task == 'classify':
    raise ConfigError(f"{own.name} has no feature 'label', which config.task='classify' needs")
  _check_classes(source.classes, config)
  classes = config.model.get('classes', 0)
  for name, examples in found.items() if classes else ():
    data.check_labels(examples[0]['label'], classes, f'{own.name}/{name}, example 0')
  images = functools.partial(data.record_batches, size=own.image_size, classes=classes)
  train, held_out = f'{own.name}/train', f'{own.name}/{own.eval_split}'
  size = own.eval_batch_size or own.batch_size
  return Source(
    like,
    lambda seed, shard, _: images(source, own.batch_size, seed=seed, train=True, name=train, shard=shard),
    lambda shard, _: images(split, size, seed=0, train=False, name=held_out, shard=shard),
    8,
  )


def _noise(config: Any) -> Source:
  """Made where it is first asked for: a batch of large clips takes memory that its shape does not."""
  own, tokens = config.data, config.task == 'next_token'
  if not own.shape:
    raise ConfigError("config.data.name='noise' needs config.data.shape: that of an example")
  classes = config.model.get('classes', 0) or config.model.get('vocabulary', 1)
  arrays = functools.cache(lambda: data.noise(own.shape, classes, own.batch_size, tokens=tokens))
  held_out = lambda: data.Arrays(*(x[: own.eval_examples or None] for x in arrays()))  # noqa: E731
  return Source(
    {'image': (tuple(own.shape), np.int32 if tokens else np.float32), 'label': ((), np.int32)},
    lambda seed, shard, _: data.array_batches(arrays(), own.batch_size, seed=seed, shard=shard),
    lambda shard, _: data.ordered_batches(held_out(), own.eval_batch_size or own.batch_size, shard=shard),
    1,
  )


def _in_memory(config: Any) -> Source:
  own = config.data
  with processes.chief_first():
    arrays, split = (_arrays(config, s) for s in ('train', own.eval_split))
  _check_alike(arrays, split, config)
  if own.augment and own.name in DIRECTIONS:
    raise ConfigError(f'config.data.augment mirrors clips, and classes of {own.name} are directions; set it to False')
  augment = data.shift_and_flip if own.augment else None
  if own.held_out and config.task == 'zero_shot':
    arrays = data.Arrays(*(x[~np.isin(arrays.label, own.held_out)] for x in arrays))
  part = functools.cache(  # a built run may be trained with several seeds
    lambda seed: data.some_of_each(arrays, own.train_examples, seed) if own.train_examples else arrays
  )
  part(config.seed)  # a number of examples that cannot be shows now
  if own.eval_examples:
    split = type(split)(*(x[: own.eval_examples] for x in split))
  return Source(
    {name: (x.shape[1:], x.dtype) for name, x in arrays._asdict().items()},
    lambda seed, shard, _: data.array_batches(part(seed), own.batch_size, seed=seed, augment=augment, shard=shard),
    lambda shard, _: data.ordered_batches(split, own.eval_batch_size or own.batch_size, shard=shard),
    1,  # more would wait for each other
  )


def _check_alike(arrays: Any, split: Any, config: Any) -> None:
  """Raises unless both splits have examples of one shape, and labels of the model's classes."""
  own, classes = config.data, config.model.get('classes', 0)
  shapes = [x.image.shape[1:] for x in (arrays, split)]
  if shapes[0] != shapes[1]:
    raise ConfigError(f'{own.name}: examples of train are {shapes[0]}, those of {own.eval_split} {shapes[1]}')
  numbered = classes and np.issubdtype(arrays.label.dtype, np.integer)  # and no values of a regression
  for name, x in (('train', arrays), (own.eval_split, split)) if numbered else ():
    data.check_labels(x.label, classes, f'{own.name}/{name}')
  unseen = sorted(set(np.unique(split.label).tolist()) - set(np.unique(arrays.label).tolist()))
  if unseen and numbered and not own.held_out:
    words = '%s: %s has labels that no example of train has: %s'
    logging.warning(words, own.name, own.eval_split, ', '.join(map(str, unseen[:5])))


def _links(config: Any) -> Source:
  own = config.data
  with processes.chief_first():
    graph = known_graph(config)
  if own.eval_split not in data.SPLITS:
    raise ConfigError(f'config.data.eval_split={own.eval_split!r} is unknown; choose from {", ".join(data.SPLITS)}')
  arrays, held_out = data.queries(graph, 'train'), data.queries(graph, own.eval_split)
  # The first links both ways, whose halves follow each other: one end may be much harder to tell than the other.
  first = np.arange(len(held_out.label)).reshape(2, -1).T.reshape(-1)[: own.eval_examples or None]
  held_out = type(held_out)(*(x[first] for x in held_out))
  if not len(held_out.label):
    raise ConfigError(f'{own.eval_split} of {own.name} has no triples to evaluate')
  arrays = data.Arrays(arrays.image, arrays.label)
  return Source(
    {name: (x.shape[1:], x.dtype) for name, x in arrays._asdict().items()},
    lambda seed, shard, _: data.array_batches(arrays, own.batch_size, seed=seed, shard=shard),
    lambda shard, _: data.ordered_batches(held_out, own.eval_batch_size or own.batch_size, shard=shard),
    1,
  )


def _nothing(*_: Any) -> Any:
  raise ConfigError('this run was built without its data')


def _check_classes(classes: int, config: Any) -> None:
  own = config.data
  if classes and classes != config.model.get('classes', 0):
    raise ConfigError(f'{own.name} in {own.folder} has {classes} classes; set --config.model.classes={classes}')


def _arrays(config: Any, split: str) -> data.Arrays | data.Directed:
  own = config.data
  if own.name == 'directed_motion':
    return data.load_directed(split, kinds(config), tuple(own.held_out), folder=own.folder, source=own.source)
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
