"""What a parameter's use computes, one kind a file: how to recognise it, its statistics, and its gradient as a matrix.

Two kinds of blocks own parameters: `Kronecker` (factors A and G; each use is a `Dense`, a `Conv` or an `Embedding`) and
`Unit` (one small matrix for each channel: scale and shift, or any free parameter). A new linear layer is a file like
dense.py, with its name in `LINEAR`.
"""

from .conv import Conv
from .dense import Dense
from .embedding import Embedding
from .kronecker import SHARING, Kronecker, Linear, Side
from .unit import Unit

LINEAR = (Dense, Conv, Embedding)

__all__ = ['LINEAR', 'SHARING', 'Conv', 'Dense', 'Embedding', 'Kronecker', 'Linear', 'Side', 'Unit']
