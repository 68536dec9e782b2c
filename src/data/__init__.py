"""Data sets prepared through TFDS as array_record, and batches that depend on the seed alone. No TensorFlow."""

from .batches import array_batches, ordered_batches, record_batches, shift_and_flip, stream
from .clips import clip_batches, prepared
from .datasets import IN_MEMORY, Arrays, DataError, class_count, data_dir, load_arrays, noise, record_source
from .layouts import LAYOUTS
from .scene_sets import SCENES, load_scenes
from .scenes import Scenes, shrunken, windows
from .video import Video, VideoError, read_video, write_video

__all__ = [
  'IN_MEMORY',
  'LAYOUTS',
  'SCENES',
  'Arrays',
  'DataError',
  'Scenes',
  'Video',
  'VideoError',
  'array_batches',
  'class_count',
  'clip_batches',
  'data_dir',
  'load_arrays',
  'load_scenes',
  'noise',
  'ordered_batches',
  'prepared',
  'read_video',
  'record_batches',
  'record_source',
  'shift_and_flip',
  'shrunken',
  'stream',
  'windows',
  'write_video',
]
