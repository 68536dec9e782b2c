"""Data sets prepared through TFDS as array_record, and batches that depend on the seed alone. No TensorFlow."""

from .batches import array_batches, ordered_batches, record_batches, shift_and_flip, stream
from .datasets import IN_MEMORY, Arrays, DataError, class_count, load_arrays, noise, record_source

__all__ = [
  'IN_MEMORY',
  'Arrays',
  'DataError',
  'array_batches',
  'class_count',
  'load_arrays',
  'noise',
  'ordered_batches',
  'record_batches',
  'record_source',
  'shift_and_flip',
  'stream',
]
