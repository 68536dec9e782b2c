"""Runs programs on images, clips and tokens in strips over a mesh axis, with halos and without gathers."""

from .halo import Strip
from .partition import partition, strip
from .values import PartitionError

__all__ = ['PartitionError', 'Strip', 'partition', 'strip']
