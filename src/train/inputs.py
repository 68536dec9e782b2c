"""Batches of a config's data, on its mesh."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from .. import data, parallel
from . import memory, registry
from .errors import ConfigError
from .graph_data import kinds, known_graph
from .runtime import processes

DIRECTIONS = ('moving_fashion_mnist', 'directed_motion')  # sets whose clips change their class when mirrored


class Source(NamedTuple):
  """The data of a config before they are put on a mesh.

  like: the shape and type of each array of an example.
  train: (seed, shard, rows) -> endless batches. held_out: (shard, rows) -> one pass of the evaluation set.
  threads: the number of threads that make batches.
  by_rows: whether images are loaded with only the rows asked for; otherwise they are cut from whole images.
  known_by: numbers or texts, by name, that processes compare so that none of them trains on different data.
  """

  like: dict[str, tuple[tuple[int, ...], Any]]
  train: Callable[[int, tuple[int, int], tuple[int, int] | None], Any]
  held_out: Callable[[tuple[int, int], tuple[int, int] | None], Any]
  threads: int
  by_rows: bool = False
  known_by: dict[str, Any] | None = None


class Data(NamedTuple):
  """The batches of a config on its mesh.

  train: (seed, number of the first batch) -> endless batches. held_out: () -> one pass of the evaluation set.
  like: the shapes of a training batch of whole images; the batches also have the padding that makes strips equal.
  strips: the strips into which images are divided.
  known_by: the values that distinguish these data from others, see `Source`.
  """

  train: Callable[[int, int], Iterator[dict[str, jax.Array]]]
  held_out: Callable[[], Iterator[dict[str, jax.Array]]]
  like: dict[str, jax.ShapeDtypeStruct]
  strips: parallel.Strips
  known_by: dict[str, Any]


# Options of config.data that some data sets do not use. Setting one there is an error, as it would have no effect.
_OPTIONS = ('augment', 'eval_examples', 'frames', 'held_out', 'shape', 'source', 'train_examples')
_OF_ARRAYS = ('augment', 'eval_examples', 'frames', 'held_out', 'train_examples')


def check_options(config: Any) -> None:
  """Raises ConfigError for an option of config.data that this data set does not use."""
  settings = config.data
  if settings.name in data.LAYOUTS:
    used = ('eval_examples', 'frames', 'source')
  elif settings.name == 'noise':
    used = ('eval_examples', 'shape')
  elif settings.name in (*data.OF_PYKEEN, 'triples', 'wordnet'):
    used = ('eval_examples', 'source')
  elif settings.name in (*data.IN_MEMORY, *data.SCENES, 'directed_motion'):
    used = _OF_ARRAYS if settings.name in ('digits', *data.MADE) else (*_OF_ARRAYS, 'source')
  else:
    used = ('eval_examples',)
  idle = [name for name in _OPTIONS if settings[name] and name not in used]
  if idle:
    what = ', '.join(used)
    raise ConfigError(
      f'config.data.{idle[0]}={settings[idle[0]]!r} does nothing to config.data.name={settings.name!r} '
      f'(of such options it looks at {what}); take it away, or name another data set'
    )


def make_data(config: Any, mesh: Mesh, load: bool = True) -> Data:
  """Makes the batches of a config; each process loads only its own strips.

  load: False if only shapes are needed; data that the shapes do not depend on are then not read.
  """
  settings = config.data
  check_options(config)
  train_size, eval_size = settings.batch_size, settings.eval_batch_size or settings.batch_size
  train_sharding = parallel.batch_sharding(mesh, train_size)
  eval_sharding = parallel.batch_sharding(mesh, eval_size, 'eval_batch_size')
  shard, eval_shard = parallel.local_part(train_sharding, train_size), parallel.local_part(eval_sharding, eval_size)
  source = _source(config, load)
  processes.require_alike('data', source.known_by or {})
  like = {name: jax.ShapeDtypeStruct((train_size, *shape), dtype) for name, (shape, dtype) in source.like.items()}
  if load:
    memory.check_batch(like.values(), config)
  example = like['inputs'].shape[1:]
  strips = parallel.image_strips(mesh, like['inputs'].shape)
  images = lambda size: parallel.image_sharding(mesh, size, strips, 1 + len(example))  # noqa: E731
  rows = parallel.local_rows(images(train_size), like['inputs'].shape, strips)

  height = len(like['inputs'].shape) - 3
  there = rows[height][rows[height] >= 0] if height in rows and source.by_rows else None
  wanted = None if there is None else (int(there[0]), int(there[-1]) + 1)
  if wanted not in (None, (0, like['inputs'].shape[height])) and settings.colour:
    raise ConfigError(
      f'config.data.colour={settings.colour} changes whole clips, and a process loads some of their rows: set it to 0'
    )
  if wanted is not None:  # images are loaded with only these rows
    rows[height] = np.where(rows[height] < 0, -1, rows[height] - wanted[0])

  def own_strips(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, 'inputs': parallel.cut(batch['inputs'], rows)}

  def streamed(batches: Any, start: int, sharding: NamedSharding, size: int) -> Iterator[dict[str, jax.Array]]:
    whole = parallel.padded_shape((size, *example), strips)
    # Images are cut where they are made, so that only the parts that are needed wait to be used.
    for batch in data.stream(batches.map(own_strips) if strips else batches, start, source.threads):
      yield {
        name: jax.make_array_from_process_local_data(images(size), x, whole)
        if name == 'inputs'
        else jax.make_array_from_process_local_data(sharding, x)
        for name, x in batch.items()
      }

  wanted_images = load and config.generated.run
  filled = registry.load('gan.generated').fill(config, mesh, example, strips) if wanted_images else None

  def train_batches(seed: int, start: int) -> Iterator[dict[str, jax.Array]]:
    batches = streamed(source.train(seed, shard, wanted), start, train_sharding, train_size)
    if filled is None:
      return batches
    return ahead(filled(batch, seed, np.uint32(number)) for number, batch in enumerate(batches, start))

  held_out = lambda: streamed(source.held_out(eval_shard, wanted), 0, eval_sharding, eval_size)  # noqa: E731
  return Data(train_batches, held_out, like, strips, source.known_by or {})


def known_by(config: Any, mesh: Mesh) -> dict[str, Any]:
  """Returns the values that distinguish a config's data from others, see `Source`."""
  return make_data(config, mesh).known_by


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
  """Yields the same batches, asking for each one when the one before it is taken."""
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
    return _in_memory(config, load)
  return _records(config, load)


class First(Sequence):
  """The first `count` examples of a source."""

  def __init__(self, source: Any, count: int):
    self.source, self.count = source, min(count, len(source))

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Any:
    return self.source[index]

  def __getattr__(self, name: str) -> Any:
    return getattr(self.source, name)


def _videos(config: Any, load: bool) -> Source:
  data_settings = config.data
  size = data_settings.image_size, data_settings.image_width or data_settings.image_size
  settings = {
    'frames': data_settings.frames or 16,
    'every': data_settings.every,
    'size': size,
    'bands': data_settings.bands,
  }
  like = {'inputs': ((settings['frames'], *size, 3), np.float32), 'label': ((), np.int32)}
  if not load:
    return Source(like, _nothing, _nothing, 1)
  where = data.data_dir(data_settings.folder)
  with processes.chief_first():
    prepared = data.prepared(
      data_settings.name,
      data_settings.source,
      where,
      rate=data_settings.rate,
      short_side=data_settings.short_side,
      bands=data_settings.bands,
    )
  if not {'train', data_settings.eval_split} <= set(prepared.info.splits):
    raise ConfigError(
      f'{data_settings.name} has the splits {", ".join(prepared.info.splits)}, not train and {data_settings.eval_split}'
    )
  source, split = (prepared.as_data_source(s) for s in ('train', data_settings.eval_split))
  split = First(split, data_settings.eval_examples) if data_settings.eval_examples else split
  _check_classes(prepared.info.features['label'].num_classes, config)
  changes = {'flip': data_settings.flip, 'colour': data_settings.colour}
  clips = functools.partial(data.clip_batches, **settings)
  return Source(
    like,
    lambda seed, shard, rows: clips(
      source, data_settings.batch_size, seed=seed, train=True, shard=shard, rows=rows, **changes
    ),
    lambda shard, rows: clips(
      split, data_settings.eval_batch_size or data_settings.batch_size, train=False, shard=shard, rows=rows
    ),
    8,
    by_rows=True,
    known_by=_of_examples({'train': source, data_settings.eval_split: split}),
  )


def _records(config: Any, load: bool) -> Source:
  settings = config.data
  like = {'inputs': ((settings.image_size, settings.image_size, 3), np.float32), 'label': ((), np.int32)}
  if not load:
    return Source(like, _nothing, _nothing, 1)
  sources = {s: data.record_source(settings.name, s, folder=settings.folder) for s in ('train', settings.eval_split)}
  source, split = sources['train'], sources[settings.eval_split]
  split = First(split, settings.eval_examples) if settings.eval_examples else split
  if not source.labelled and config.task == 'classify':
    raise ConfigError(f"{settings.name} has no feature 'label', which config.task='classify' needs")
  _check_classes(source.classes, config)
  classes = config.model.get('classes', 0)
  for name, examples in sources.items() if classes else ():
    data.check_labels(examples[0]['label'], classes, f'{settings.name}/{name}, example 0')
  images = functools.partial(data.record_batches, size=settings.image_size, classes=classes)
  train, held_out = f'{settings.name}/train', f'{settings.name}/{settings.eval_split}'
  size = settings.eval_batch_size or settings.batch_size
  return Source(
    like,
    lambda seed, shard, _: images(source, settings.batch_size, seed=seed, train=True, name=train, shard=shard),
    lambda shard, _: images(split, size, seed=0, train=False, name=held_out, shard=shard),
    8,
    known_by=_of_examples(sources),
  )


def _noise(config: Any) -> Source:
  """Makes a source whose arrays are made on first use: a batch of large clips takes memory, but its shape does not."""
  settings, tokens = config.data, config.task == 'next_token'
  if not settings.shape:
    raise ConfigError("config.data.name='noise' needs config.data.shape: that of an example")
  classes = config.model.get('classes', 0) or config.model.get('vocabulary', 1)
  arrays = functools.cache(lambda: data.noise(settings.shape, classes, settings.batch_size, tokens=tokens))
  held_out = lambda: data.Arrays(*(x[: settings.eval_examples or None] for x in arrays()))  # noqa: E731
  return Source(
    {'inputs': (tuple(settings.shape), np.int32 if tokens else np.float32), 'label': ((), np.int32)},
    lambda seed, shard, _: data.array_batches(arrays(), settings.batch_size, seed=seed, shard=shard),
    lambda shard, _: data.ordered_batches(held_out(), settings.eval_batch_size or settings.batch_size, shard=shard),
    1,
  )


def _in_memory(config: Any, load: bool) -> Source:
  settings = config.data
  shape = None if load else data.example_shape(settings.name, settings.source)
  if shape is not None:
    return Source({'inputs': (shape, np.float32), 'label': ((), np.int32)}, _nothing, _nothing, 1)
  with processes.chief_first():
    arrays, split = (_arrays(config, s) for s in ('train', settings.eval_split))
  _check_alike(arrays, split, config)
  _tell_scales(arrays, split, config)
  if settings.augment and settings.name in DIRECTIONS:
    raise ConfigError(
      f'config.data.augment mirrors clips, and classes of {settings.name} are directions; set it to False'
    )
  augment = data.shift_and_flip if settings.augment else None
  if settings.held_out and config.task == 'zero_shot':
    arrays = data.Arrays(*(x[~np.isin(arrays.label, settings.held_out)] for x in arrays))
  part = functools.cache(  # a built run may be trained with several seeds
    lambda seed: data.some_of_each(arrays, settings.train_examples, seed) if settings.train_examples else arrays
  )
  part(config.seed)  # an impossible number of examples raises its error here
  if settings.eval_examples:
    split = type(split)(*(x[: settings.eval_examples] for x in split))
  return Source(
    {name: (x.shape[1:], x.dtype) for name, x in arrays._asdict().items()},
    lambda seed, shard, _: data.array_batches(part(seed), settings.batch_size, seed=seed, augment=augment, shard=shard),
    lambda shard, _: data.ordered_batches(split, settings.eval_batch_size or settings.batch_size, shard=shard),
    1,  # more threads would wait for each other
    known_by=_of_arrays({'train': arrays, settings.eval_split: split}),
  )


def _check_alike(arrays: Any, split: Any, config: Any) -> None:
  """Raises an error unless both splits have examples of one shape, and labels of the model's classes."""
  settings, classes = config.data, config.model.get('classes', 0)
  shapes = [x.inputs.shape[1:] for x in (arrays, split)]
  if shapes[0] != shapes[1]:
    raise ConfigError(f'{settings.name}: examples of train are {shapes[0]}, those of {settings.eval_split} {shapes[1]}')
  numbered = classes and np.issubdtype(arrays.label.dtype, np.integer)  # not the values of a regression
  for name, x in (('train', arrays), (settings.eval_split, split)) if numbered else ():
    data.check_labels(x.label, classes, f'{settings.name}/{name}')
  unseen = sorted(set(np.unique(split.label).tolist()) - set(np.unique(arrays.label).tolist()))
  if unseen and numbered and not settings.held_out:
    words = '%s: %s has labels that no example of train has: %s'
    logging.warning(words, settings.name, settings.eval_split, ', '.join(map(str, unseen[:5])))


def _tell_scales(arrays: Any, split: Any, config: Any) -> None:
  """Warns if the inputs of one split reach over 20 times as far as the other's, as if stored differently."""
  most = [float(np.abs(x.inputs).max(initial=0)) for x in (arrays, split)]
  if min(most) > 0 and max(most) > 20 * min(most):
    words = '%s: inputs of train reach %.4g, those of %s %.4g; are both stored in the same way?'
    logging.warning(words, config.data.name, most[0], config.data.eval_split, most[1])


def _links(config: Any) -> Source:
  settings = config.data
  with processes.chief_first():
    graph = known_graph(config)
  if settings.eval_split not in data.SPLITS:
    raise ConfigError(
      f'config.data.eval_split={settings.eval_split!r} is unknown; choose from {", ".join(data.SPLITS)}'
    )
  arrays, held_out = data.queries(graph, 'train'), data.queries(graph, settings.eval_split)
  # The queries for one end come before those for the other. Take equally many of both, as one may be much harder.
  first = np.arange(len(held_out.label)).reshape(2, -1).T.reshape(-1)[: settings.eval_examples or None]
  held_out = type(held_out)(*(x[first] for x in held_out))
  if not len(held_out.label):
    raise ConfigError(
      f'{settings.eval_split} of {settings.source or settings.name} has no triples to evaluate; '
      'choose another data.eval_split'
    )
  arrays = data.Arrays(arrays.inputs, arrays.label)
  return Source(
    {name: (x.shape[1:], x.dtype) for name, x in arrays._asdict().items()},
    lambda seed, shard, _: data.array_batches(arrays, settings.batch_size, seed=seed, shard=shard),
    lambda shard, _: data.ordered_batches(held_out, settings.eval_batch_size or settings.batch_size, shard=shard),
    1,
    known_by=_of_arrays({'train': arrays, settings.eval_split: held_out}),
  )


def _of_arrays(splits: dict[str, Any]) -> dict[str, Any]:
  """Returns, for each split, the shape of its inputs and a digest of at most a million values of each array."""
  arrays_read = {}
  for name, arrays in splits.items():
    digest = hashlib.sha256()
    for x in map(np.asarray, arrays):
      digest.update(f'{x.shape} {x.dtype}'.encode() + x.reshape(-1)[:: 1 + x.size // 2**20].tobytes())
    arrays_read[f'{name}: shape'], arrays_read[f'{name}: contents'] = list(arrays[0].shape), digest.hexdigest()[:16]
  return arrays_read


def _of_examples(splits: dict[str, Any]) -> dict[str, Any]:
  """Returns, for each split, the number of its examples and a digest of sixteen of them."""
  shapes = {}
  for name, source in splits.items():
    digest, size = hashlib.sha256(), len(source)
    digest.update(repr(getattr(source, 'names', '')).encode())  # names of classes, which give the labels their numbers
    for index in sorted({i * (size - 1) // 15 for i in range(16)}) if size else ():
      for key, value in sorted(source[index].items()):
        digest.update(f'{key} {value if not isinstance(value, np.ndarray | bytes) else ""}'.encode())
        digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
    shapes[f'{name}: examples'], shapes[f'{name}: contents'] = size, digest.hexdigest()[:16]
  return shapes


def _nothing(*_: Any) -> Any:
  raise ConfigError('this run was built without its data')


def _check_classes(classes: int, config: Any) -> None:
  settings = config.data
  if classes and classes != config.model.get('classes', 0):
    where = f'{settings.name} in {settings.folder}'
    if classes == 1:
      raise ConfigError(
        f'{where} has one class; classes are the folders right below train and test: move them up if they lie deeper'
      )
    raise ConfigError(f'{where} has {classes} classes; set --config.model.classes={classes}')


def _arrays(config: Any, split: str) -> data.Arrays | data.Directed:
  settings = config.data
  if settings.name == 'directed_motion':
    return data.load_directed(
      split, kinds(config), tuple(settings.held_out), folder=settings.folder, source=settings.source
    )
  if settings.name in data.SCENES:
    scenes = data.shrunken(
      data.load_scenes(settings.name, split, folder=settings.folder, source=settings.source), settings.short_side
    )
    return data.windows(scenes, settings.frames or 8, settings.every, balanced=split == 'train')
  arrays = data.load_arrays(settings.name, split, folder=settings.folder, source=settings.source)
  if not settings.frames:
    return arrays
  if arrays.inputs.ndim != 5 or settings.frames > arrays.inputs.shape[1]:
    raise ConfigError(
      f'config.data.frames={settings.frames}: examples of {settings.name} are {arrays.inputs.shape[1:]}'
    )
  start = (arrays.inputs.shape[1] - settings.frames) // 2
  return arrays._replace(inputs=arrays.inputs[:, start : start + settings.frames])
