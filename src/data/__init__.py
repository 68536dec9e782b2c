"""Data sets prepared through TFDS as array_record, and batches that depend on the seed alone. No TensorFlow."""

from .batches import array_batches, record_batches
from .datasets import DATASETS, DataError, load_arrays, record_source

__all__ = ['DATASETS', 'DataError', 'array_batches', 'load_arrays', 'record_batches', 'record_source']
