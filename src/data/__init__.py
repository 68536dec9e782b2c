"""Data sets prepared through TFDS as array_record, and batches that depend on the seed alone. No TensorFlow."""

from .batches import array_batches, ordered_batches, record_batches, shift_and_flip, stream
from .clips import clip_batches, prepared
from .datasets import (
  IN_MEMORY,
  Arrays,
  DataError,
  class_count,
  data_dir,
  load_arrays,
  noise,
  record_source,
  some_of_each,
  write_arrays,
)
from .directed import Directed, load_directed
from .layouts import LAYOUTS
from .partition import Parts, both_directions, partitioned, permuted
from .scene_sets import SCENES, load_scenes
from .scenes import Scenes, shrunken, windows
from .triples import OF_PYKEEN, SPLITS, KnowledgeGraph, Queries, load_triples, queries, read_triples
from .video import Video, VideoError, read_video, write_video
from .wordnet import GARMENTS, above, noun_graph, read_nouns, synsets

__all__ = [
  'GARMENTS',
  'IN_MEMORY',
  'LAYOUTS',
  'OF_PYKEEN',
  'SCENES',
  'SPLITS',
  'Arrays',
  'DataError',
  'Directed',
  'KnowledgeGraph',
  'Parts',
  'Queries',
  'Scenes',
  'Video',
  'VideoError',
  'above',
  'array_batches',
  'both_directions',
  'class_count',
  'clip_batches',
  'data_dir',
  'load_arrays',
  'load_directed',
  'load_scenes',
  'load_triples',
  'noise',
  'noun_graph',
  'ordered_batches',
  'partitioned',
  'permuted',
  'prepared',
  'queries',
  'read_nouns',
  'read_triples',
  'read_video',
  'record_batches',
  'record_source',
  'shift_and_flip',
  'shrunken',
  'some_of_each',
  'stream',
  'synsets',
  'windows',
  'write_arrays',
  'write_video',
]
