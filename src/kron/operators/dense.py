"""Matrix products: y = x W over any number of contracted, free and leading axes, the kernel on either side."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Array, Float

from ..program import Op
from ..weights import Move, Weight


class Dense(NamedTuple):
  """`dot_general` without batch axes; `contract` are the data's contracted axes in the kernel's order."""

  kernel_moves: tuple[Move, ...]  # kernel -> (n_in, n_out)
  n_in: int
  n_out: int
  features: tuple[int, ...]  # the axes of y that come from the kernel
  contract: tuple[int, ...]
  kernel_first: bool
  scale: float

  name = 'dense'

  @classmethod
  def recognise(cls, op: Op, position: int, weight: Weight) -> Dense | None:
    """The operator, if `op` multiplies data by the kernel in operand `position`."""
    if op.name != 'dot_general' or not weight.covers(op.inputs[position].shape):
      return None
    contract, batch = op.params['dimension_numbers']
    if batch[position]:
      return None
    shape, y_ndim = op.inputs[position].shape, len(op.outputs[0].shape)
    inner = tuple(contract[position])
    free = tuple(axis for axis in range(len(shape)) if axis not in inner)
    features = range(len(free)) if position == 0 else range(y_ndim - len(free), y_ndim)
    return cls(
      kernel_moves=weight.matrix_moves(inner, free),
      n_in=math.prod(shape[a] for a in inner),
      n_out=math.prod(shape[a] for a in free),
      features=tuple(features),
      contract=tuple(contract[1 - position]),
      kernel_first=position == 0,
      scale=weight.scale,
    )

  def input_rows(self, x: Float[Array, '...']) -> Float[Array, 'rows n_in']:
    """One row for each use of the kernel."""
    leading = [axis for axis in range(x.ndim) if axis not in self.contract]
    return x.transpose((*leading, *self.contract)).reshape(-1, self.n_in)

  def output_rows(self, dy: Float[Array, '...']) -> Float[Array, 'rows n_out']:
    return dy.reshape(self.n_out, -1).T if self.kernel_first else dy.reshape(-1, self.n_out)
