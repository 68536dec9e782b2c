"""Settings that follow from the data: a config leaves them at 0, and they are filled in before anything is built."""

from __future__ import annotations

from typing import Any

from .. import data

_LARGEST = 256  # examples in a batch that fits itself
_LEAST_STEPS = 4  # steps in an epoch of such a batch


def fit(config: Any) -> None:
  """Fills in model.classes and data.batch_size where they are 0, for a folder of pictures or a file of arrays.

  The classes are counted. The batch is the largest power of two that leaves four steps in an epoch, at most 256. A
  config without such zeros stays as it is.

  Raises:
    DataError: there are no such files.
  """
  settings = config.data
  if (config.model.get('classes', 1) and settings.batch_size) or settings.name not in ('image_folder', 'arrays'):
    return
  examples, classes = _counted(config)
  if config.model.get('classes', 1) == 0:
    config.model.classes = classes
  if settings.batch_size == 0:
    settings.batch_size = batch_that_fits(examples)


def batch_that_fits(examples: int) -> int:
  """Returns the largest power of two that leaves four steps in an epoch of `examples`, between 1 and 256."""
  most = min(_LARGEST, max(1, examples // _LEAST_STEPS))
  return 2 ** (most.bit_length() - 1)


def _counted(config: Any) -> tuple[int, int]:
  """Returns the numbers of training examples and of classes."""
  settings = config.data
  if settings.name == 'image_folder':
    source = data.record_source(settings.name, 'train', folder=settings.folder)
    return len(source), source.classes
  label = data.load_arrays(settings.name, 'train', source=settings.source).label
  return len(label), int(label.max()) + 1
