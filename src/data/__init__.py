"""Data sets that TFDS prepares as array_record, and batches that depend on the seed alone. Nothing needs TensorFlow."""

from ..extras import need

need('train', 'tensorflow_datasets', 'grain', 'array_record', 'PIL', 'scipy')  # isort: split

from .arrays import Arrays, check_labels, noise, some_of_each, write_arrays
from .batches import array_batches, ordered_batches, prepared_picture, record_batches, shift_and_flip, stream
from .clips import clip_batches, prepared
from .datasets import IN_MEMORY, data_dir, example_shape, load_arrays, record_source
from .directed import Directed, load_directed
from .errors import DataError
from .folders import files_below, shown
from .image_folder import ImageFolder
from .layouts import LAYOUTS
from .limits import check_size, free_memory, in_words
from .made import MADE
from .partition import Parts, both_directions, partitioned, permuted
from .scene_sets import SCENES, load_scenes
from .scenes import Scenes, shrunken, windows
from .text import read_lines, read_table
from .triples import OF_PYKEEN, SPLITS, KnowledgeGraph, Queries, load_triples, queries, read_triples
from .video import Video, VideoError, read_video, write_video
from .wordnet import GARMENTS, above, noun_graph, read_nouns, synsets

__all__ = [
  'GARMENTS',
  'IN_MEMORY',
  'LAYOUTS',
  'MADE',
  'OF_PYKEEN',
  'SCENES',
  'SPLITS',
  'Arrays',
  'DataError',
  'Directed',
  'ImageFolder',
  'KnowledgeGraph',
  'Parts',
  'Queries',
  'Scenes',
  'Video',
  'VideoError',
  'above',
  'array_batches',
  'both_directions',
  'check_labels',
  'check_size',
  'clip_batches',
  'data_dir',
  'example_shape',
  'files_below',
  'free_memory',
  'in_words',
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
  'prepared_picture',
  'queries',
  'read_lines',
  'read_nouns',
  'read_table',
  'read_triples',
  'read_video',
  'record_batches',
  'record_source',
  'shift_and_flip',
  'shown',
  'shrunken',
  'some_of_each',
  'stream',
  'synsets',
  'windows',
  'write_arrays',
  'write_video',
]
