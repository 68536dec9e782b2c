"""Ternary networks for FPGAs: training, an exact integer form, files, and logic.

`ternary` and `activations` make weights and activations of a few bits inside a loss. `fold` turns what was trained into
a `Network` of integers. `reference` (NumPy) and `program` (JAX) compute it, equal bit for bit.
"""

from .errors import EdgeError
from .layers import Conv, Head, Network, Numbers, Plan
from .program import forward
from .reference import streams

__all__ = ['Conv', 'EdgeError', 'Head', 'Network', 'Numbers', 'Plan', 'forward', 'streams']
