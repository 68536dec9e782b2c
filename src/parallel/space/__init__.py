"""Images, clips and tokens in strips over a mesh axis, and programs that run on them with halos and gather nothing."""

from .halo import Strip
from .partition import partition, strip
from .values import PartitionError

__all__ = ['PartitionError', 'Strip', 'partition', 'strip']
