"""Images, clips and tokens in strips over a mesh axis, and programs that run on them with halos and gather nothing."""

from .halo import Strip
from .split import split, strip
from .values import SplitError

__all__ = ['SplitError', 'Strip', 'split', 'strip']
