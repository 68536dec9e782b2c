"""Endless batches as grain datasets, whose order and augmentation depend on the seed, never on devices or hosts.

The batch of step i is a function of (seed, i). So an iterator's state is its next index, and a resumed run sees the
batches of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import Float, Shaped

from .arrays import Arrays, check_labels
from .errors import DataError
from .folders import shown
from .limits import read_file
from .pictures import decode

Batch = dict[str, np.ndarray]
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def array_batches(
  arrays: Arrays, batch_size: int, *, seed: int, augment: Augment | None = None, shard: tuple[int, int] = (0, 1)
) -> grain.MapDataset:
  """Returns batches of a data set in memory, cut by indexing a whole batch at once.

  Every epoch is a new permutation. Batches continue across its end, so all have the same size. Batch i depends on the
  seed and i alone.

  Args:
    arrays: the split.
    batch_size: size of the global batch.
    seed: seed of order and augmentation.
    augment: (images, generator) -> images, applied to the global batch.
    shard: (index, count) of this process's part of every batch.

  Returns:
    A data set whose items are dicts with the fields of `arrays`, each an array of this process's examples.
  """
  n = len(arrays.label)

  def make(step: int) -> Batch:
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, n)
    order = {e: np.random.default_rng((seed, 0, int(e))).permutation(n) for e in np.unique(epochs)}
    rows = np.asarray([order[e][o] for e, o in zip(epochs, offsets, strict=True)])
    images = arrays.inputs[rows]
    if augment is not None:
      # The whole batch is augmented before the shard is cut, so that the number of hosts changes nothing.
      images = augment(images, np.random.default_rng((seed, 1, step)))
    part = slice(shard[0] * batch_size // shard[1], (shard[0] + 1) * batch_size // shard[1])
    return {**{name: x[rows][part] for name, x in arrays._asdict().items() if name != 'inputs'}, 'inputs': images[part]}

  return grain.MapDataset.range(2**40).map(make)


def ordered_batches(arrays: Arrays, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> grain.MapDataset:
  """Returns the batches of one pass in the set's order. The last batch is filled up with its last example.

  Args:
    arrays: the split.
    batch_size: size of the global batch.
    shard: (index, count) of this process's part of every batch.

  Returns:
    A data set whose items are dicts with the fields of `arrays`, each an array of this process's examples, and `mask`,
    which is 1 for examples and 0 for what fills the last batch.
  """
  n = len(arrays.label)

  def make(step: int) -> Batch:
    first = step * batch_size
    positions = np.arange(first + shard[0] * batch_size // shard[1], first + (shard[0] + 1) * batch_size // shard[1])
    rows = np.minimum(positions, n - 1)
    return {**{name: x[rows] for name, x in arrays._asdict().items()}, 'mask': (positions < n).astype(np.float32)}

  return grain.MapDataset.range(-(-n // batch_size)).map(make)


def stream(batches: grain.MapDataset, start: int = 0, threads: int = 1) -> Iterator[Batch]:
  """Returns an iterator over batches, which threads make ahead of their use.

  As many batches as threads wait in memory.

  Args:
    batches: a data set of batches, such as `array_batches` returns.
    start: the number of the first batch; a run that resumes at step i continues with batch i.
    threads: the number of threads that make batches.

  Raises:
    DataError: a batch cannot be made from its data.
  """
  iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
  iterator.set_state({'next_index': start})
  return _with_plain_errors(iterator)


def _with_plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
  """Yields the same batches, and raises errors of data without the lines that grain adds about its frames."""
  try:
    yield from batches
  except DataError as error:
    raise type(error)(str(error).partition('\n')[0]) from error


def shift_and_flip(
  images: Shaped[np.ndarray, ' n *image'], rng: np.random.Generator, *, pixels: int = 2
) -> Shaped[np.ndarray, ' n *image']:
  """Returns images of which each is moved by up to `pixels` along both axes, and half are mirrored, at random.

  The gap is filled with zeros. All frames of a clip change in the same way.

  Args:
    images: images, (n, h, w, c), or clips, (n, t, h, w, c).
    rng: the generator of the random changes.
    pixels: the farthest move, in pixels.
  """
  if images.ndim == 5:  # frames become channels, so that all get the same change
    n, t, h, w, c = images.shape
    changed = shift_and_flip(np.moveaxis(images, 1, 3).reshape(n, h, w, t * c), rng, pixels=pixels)
    return np.moveaxis(changed.reshape(n, h, w, t, c), 3, 1)
  n, height, width, _ = images.shape
  padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
  top, left = rng.integers(0, 2 * pixels + 1, (2, n))
  rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)
  columns = np.where(rng.random(n)[:, None] < 0.5, columns, columns[:, ::-1])
  return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def record_batches(
  source: Sequence[dict[str, Any]],
  batch_size: int,
  *,
  seed: int,
  size: int,
  train: bool,
  classes: int = 0,
  name: str = '',
  shard: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
  """Returns batches of encoded images, each decoded, cropped to `size` and normalised.

  Training crops a random part (8 to 100 % of the area) and mirrors half of the images, without end. Evaluation takes
  the centre, in one pass with a `mask` as in `ordered_batches`. The next record replaces one that cannot be read.

  Args:
    source: examples {'image': an encoded picture or an array of bytes, 'label'}, such as `record_source` returns.
    batch_size: size of the global batch.
    seed: seed of order and augmentation.
    size: height and width of the images in the batch, in pixels.
    train: whether to take random crops in a new order every epoch; else the centre, in the set's order.
    classes: number of classes; 0 skips the check of labels.
    name: the name of the set, for messages.
    shard: (index, count) of this process's part of every batch.

  Returns:
    A data set whose items are dicts of `inputs`, (b, size, size, 3) as float32, `label`, (b,), and in evaluation
    `mask`, (b,). The mean and deviation of each colour over ImageNet become 0 and 1.

  Raises:
    DataError: when a batch is made, a label is none of the classes, or too many records cannot be read.
  """
  crop = _random_crop(size) if train else None
  readable = Labelled(Readable(source, _decode), classes, name)
  return example_batches(readable, batch_size, crop, _centre_crop(size), seed=seed, shard=shard)


class Labelled:
  """A source of examples whose labels are checked when they are read; a label that is no class raises DataError."""

  def __init__(self, source: Sequence[dict[str, Any]], classes: int, name: str):
    self.source, self.classes, self.name = source, classes, name

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self.source[index]
    if self.classes:
      check_labels(example['label'], self.classes, f'{self.name}, example {index}')
    return example


def example_batches(
  source: Sequence[dict[str, Any]],
  batch_size: int,
  random: Callable[[dict[str, Any], np.random.Generator], Batch] | None,
  fixed: Callable[[dict[str, Any]], Batch],
  *,
  seed: int,
  shard: tuple[int, int],
) -> grain.MapDataset:
  """Returns batches of examples that `random` or, where that is None, `fixed` makes one by one.

  `random` sees a new order every epoch, without end; `fixed` makes one pass with a `mask`.
  """
  if random is not None:
    # Randomness comes before the shard is cut, so that the number of hosts changes nothing.
    data = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(random)
  else:
    n = len(source)
    data = grain.MapDataset.range(-(-n // batch_size) * batch_size)
    data = data.map(lambda i: {**fixed(source[min(i, n - 1)]), 'mask': np.float32(i < n)})
  return data.slice(slice(shard[0], None, shard[1])).batch(batch_size // shard[1])


_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


class Readable:
  """A source of examples that replaces a record that cannot be read by the next one that can.

  Each replacement is logged once. The same records are replaced on every host and after every resumption. `decode` does
  whatever else belongs to reading an example.

  Raises:
    DataError: too many records cannot be read: over 1 % of all, and over ten or a fifth of all, whichever is less.
  """

  def __init__(self, source: Sequence[dict[str, Any]], decode: Callable[[dict[str, Any]], dict[str, Any]] = dict):
    self.source, self.decode, self.bad = source, decode, set()

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    n = len(self.source)
    for number in (k % n for k in range(index, index + n)):
      try:
        return self.decode(self.source[number])
      except Exception as error:
        self._note(number, error)
    raise DataError('not one record can be read; mend the data set')  # not reached: _note raises before

  def _note(self, number: int, error: Exception) -> None:
    name_of = getattr(self.source, 'name_of', None)
    name = f' ({name_of(number)})' if name_of else ''
    words = f'record {number} of {len(self.source)}{name} cannot be read: {(str(error).splitlines() or [""])[0][:150]}'
    if number not in self.bad:
      self.bad.add(number)
      logging.warning('%s; the next one takes its place', words)
    n = len(self.source)
    if len(self.bad) > max(min(10, n // 5), n // 100) or len(self.bad) == n:
      raise DataError(f'{words}, and {len(self.bad) - 1} others; mend the data set') from error


def _decode(example: dict[str, Any]) -> dict[str, Any]:
  return {**example, 'image': decode(example['image'])}


def _finish(image: Any, label: Any) -> Batch:
  pixels = np.asarray(image, np.float32) / 255
  return {'inputs': (pixels - _MEAN) / _STD, 'label': np.int32(label)}


def _random_crop(size: int) -> Callable:
  def crop(example: dict[str, Any], rng: np.random.Generator) -> Batch:
    image = example['image']
    width, height = image.size
    area = width * height * rng.uniform(0.08, 1)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    image = image.resize((size, size), 2, (left, top, left + w, top + h))
    batch = _finish(image, example['label'])
    return {**batch, 'inputs': batch['inputs'][:, ::-1]} if rng.random() < 0.5 else batch

  return crop


def _centre_crop(size: int) -> Callable:
  def crop(example: dict[str, Any]) -> Batch:
    image = example['image']
    side = min(image.size) * 0.875
    left, top = (image.size[0] - side) / 2, (image.size[1] - side) / 2
    return _finish(image.resize((size, size), 2, (left, top, left + side, top + side)), example['label'])

  return crop


def prepared_picture(path: str | Path, size: int) -> Float[np.ndarray, 'h w 3']:
  """Reads a picture as `record_batches` does for an evaluation: its centre, `size` pixels wide, normalised.

  Args:
    path: the file of the picture.
    size: the side of the result in pixels.

  Raises:
    DataError: the file cannot be read as a picture.
  """
  try:
    return _centre_crop(size)(_decode({'image': read_file(Path(path)), 'label': 0}))['inputs']
  except (OSError, ValueError) as error:
    raise DataError(
      f'{shown(Path(path))}: cannot be read as a picture ({" ".join(str(error).split())[:100]})'
    ) from error
