"""Operators that use parameters: how to recognise them, their statistics, and their gradients as matrices.

Each file holds one kind of operator. Three kinds of blocks own parameters: `Kronecker` (factors A and G; each use is a
`Dense`, a `Conv` or an `Embedding`), `Unitwise` (the same kernels by output unit, or by their diagonal) and `Unit` (one
small matrix for each channel, for scale and shift or any free parameter). To add a linear layer, write a file like
dense.py and add its class to `LINEAR`.
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
