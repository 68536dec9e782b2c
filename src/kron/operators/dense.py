"""Matrix products y = x W over any contracted, free and batch axes, with the kernel on either side.

Batch axes along which the kernel differs (experts, heads) are slots, with one pair of factors each. If the data are
one-hot, as in an embedding computed as a product, the input factor is the diagonal of their squares.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from ...program import Op
from ..errors import CurvatureError
from .factor import accurate
from .masks import fits
from .weights import Weight


class Dense(NamedTuple):
  """A `dot_general`; `kernel_axes` are the kernel's axes that make the slots, rows and columns of its matrix."""

  kernel_shape: tuple[int, ...]
  kernel_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
  slots: int
  n_in: int
  n_out: int
  features: tuple[int, ...]  # the axes of y that come from the kernel: slots, then columns
  input_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # the axes of x: slots, uses, contracted
  output_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # the axes of y: slots, uses, columns
  one_hot: bool = False

  @property
  def name(self) -> str:
    return 'embedding' if self.one_hot else 'dense'

  @classmethod
  def recognise(cls, op: Op, position: int, weight: Weight) -> Dense | None:
    """Returns the operator if `op` multiplies data by the kernel in operand `position`, else None."""
    if op.name != 'dot_general' or not weight.unique:
      return None
    contract, batch = op.params['dimension_numbers']
    shape, other = op.inputs[position].shape, op.inputs[1 - position].shape
    inner, batched = tuple(contract[position]), tuple(batch[position])
    free = tuple(a for a in range(len(shape)) if a not in inner and a not in batched)
    slots = [k for k, a in enumerate(batched) if a in weight.axes]
    repeated = [k for k in range(len(batched)) if k not in slots]
    if any(shape[a] != 1 and a not in weight.axes for a in (*inner, *free)):
      return None
    x_batch = tuple(batch[1 - position])
    x_free = tuple(a for a in range(len(other)) if a not in x_batch and a not in contract[1 - position])
    lead = len(batched)
    y_free, y_out = range(lead, lead + len(x_free)), range(lead + len(x_free), lead + len(x_free) + len(free))
    if position == 0:
      y_out, y_free = range(lead, lead + len(free)), range(lead + len(free), lead + len(free) + len(x_free))
    kernel_axes = (tuple(batched[k] for k in slots), inner, free)
    sizes = [math.prod(shape[a] for a in group) for group in kernel_axes]
    return cls(
      shape,
      kernel_axes,
      *sizes,
      features=(*slots, *y_out),
      input_axes=(
        tuple(x_batch[k] for k in slots),
        (*(x_batch[k] for k in repeated), *x_free),
        tuple(contract[1 - position]),
      ),
      output_axes=(tuple(slots), (*repeated, *y_free), tuple(y_out)),
    )

  def matrix(self, kernel: Array) -> Float[Array, 's i o']:
    return kernel_matrix(self, kernel)

  @property
  def examples(self) -> tuple[int, int] | None:
    """Returns the axes of x and y that count examples (possibly merged with their uses), or None without such axes."""
    return (self.input_axes[1][0], self.output_axes[1][0]) if self.input_axes[1] else None

  @property
  def row_axes(self) -> tuple[int, ...]:
    """Returns the kernel's axes along which its rows may be scaled; `column_axes` does the same for its columns."""
    return self.kernel_axes[0] + self.kernel_axes[1]

  @property
  def column_axes(self) -> tuple[int, ...]:
    return self.kernel_axes[0] + self.kernel_axes[2]

  def input_rows(self, x: Inexact[Array, '...']) -> Inexact[Array, 's b r i']:
    """Returns one row for each use of the kernel; b is the first axis that is not the kernel's."""
    return rows(x, self.input_axes)

  def output_rows(self, dy: Inexact[Array, '...']) -> Inexact[Array, 's b r o']:
    return rows(dy, self.output_axes)

  def mask(
    self, where: Float[Array, '...'], x: Inexact[Array, '...'], dy: Inexact[Array, '...']
  ) -> Float[Array, '...']:
    """Returns a mask of uses (see `kron.used`) in the shape of the input."""
    del dy
    if not fits(where.shape, x.shape):
      raise CurvatureError(f'kron.used: where has shape {where.shape}, which does not broadcast to the input {x.shape}')
    return jnp.broadcast_to(where, x.shape)

  def mask_rows(self, where: Float[Array, '...'], dy: Inexact[Array, '...']) -> Float[Array, 's b r 1']:
    """Returns one number for each row; a row counts where all of its features count."""
    del dy
    return rows(where, self.input_axes).min(-1, keepdims=True)

  def without(self, x: Inexact[Array, '...'], where: Float[Array, 's b r 1']) -> Inexact[Array, '...']:
    """Empties the one-hot rows that do not count."""
    slots, uses, features = self.input_axes
    lengths = [x.shape[a] for a in (*slots, *uses)] + [1] * len(features)
    back = [[*slots, *uses, *features].index(a) for a in range(x.ndim)]
    return x * where.reshape(lengths).transpose(back).astype(x.dtype)

  def input_diagonal(self, x: Inexact[Array, '...']) -> Float[Array, 's i']:
    return (accurate(rows(x, self.input_axes)) ** 2).sum((1, 2))

  def scatter(self, x: Inexact[Array, '...'], y: Float[Array, 's k o']) -> Float[Array, 's i o']:
    """Sums the rows of y by their one-hot index, each multiplied by the square of its one-hot entry."""
    squares = accurate(rows(x, self.input_axes)) ** 2
    return jnp.einsum('ski,sko->sio', squares.reshape(squares.shape[0], -1, squares.shape[-1]), y)

  def present(self, x: Inexact[Array, '...']) -> Bool[Array, 's b r']:
    """Returns which one-hot rows are not empty."""
    return (rows(x, self.input_axes) != 0).any(-1)


def rows(x: Array, axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> Inexact[Array, 's b r n']:
  """Gathers the axes of x into slots, examples (the first axis of the uses), further uses, and features."""
  slots, uses, features = axes
  sizes = [math.prod(x.shape[a] for a in group) for group in (slots, uses[:1], uses[1:], features)]
  return x.transpose((*slots, *uses, *features)).reshape(sizes)


def kernel_matrix(linear: Any, kernel: Array) -> Float[Array, 's i o']:
  """Reshapes a kernel, or an array of its shape, to one matrix for each slot."""
  axes = [a for group in linear.kernel_axes for a in group]
  axes += [a for a in range(len(linear.kernel_shape)) if a not in axes]  # axes of length one
  return kernel.reshape(linear.kernel_shape).transpose(axes).reshape(linear.slots, linear.n_in, linear.n_out)
