"""What a parameter's use computes, one kind a file: how to recognise it, its statistics, and its gradient as a matrix.

Three kinds of blocks own parameters: `Kronecker` (factors A and G; each use is a `Dense`, a `Conv` or an `Embedding`),
`Unitwise` (the same kernels by output unit, or by their diagonal) and `Unit` (one small matrix for each channel: scale and
shift, or any free parameter). A new linear layer is a file like dense.py, with its name in `LINEAR`.
"""

from .conv import Conv
from .dense import Dense
from .embedding import Embedding
from .kernel import APPROXIMATIONS, SHARING, Linear, Side
from .kronecker import Kronecker
from .unit import Unit
from .unitwise import Unitwise

LINEAR = (Dense, Conv, Embedding)

__all__ = [
  'APPROXIMATIONS',
  'LINEAR',
  'SHARING',
  'Conv',
  'Dense',
  'Embedding',
  'Kronecker',
  'Linear',
  'Side',
  'Unit',
  'Unitwise',
]
