"""Images, clips and tokens in strips over a mesh axis: programs that run on them with halos, and nothing gathered."""

from .halo import Strip
from .split import split, strip
from .values import SplitError

__all__ = ['SplitError', 'Strip', 'split', 'strip']
