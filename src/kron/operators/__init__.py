"""What a parameter's use computes, one kind a file: how to recognise it, its statistics, and its gradient as a matrix.

Two kinds of blocks own parameters: `Kronecker` (factors A and G; the operation is a `Dense` or a `Conv`) and `Unit` (one
small matrix for each channel: scale and shift, or a plain diagonal). A new linear layer is a file like dense.py, with its
name in `LINEAR`.
"""

from .conv import Conv
from .dense import Dense
from .kronecker import Kronecker
from .unit import Unit

LINEAR = (Dense, Conv)

__all__ = ['LINEAR', 'Conv', 'Dense', 'Kronecker', 'Unit']
