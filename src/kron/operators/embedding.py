"""Embeddings, which look up rows of a table with `gather`.

The input is a one-hot vector, so its factor is a diagonal of counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int

from ...program import Op
from ..errors import CurvatureError
from .dense import kernel_matrix
from .weights import Weight


class Embedding(NamedTuple):
  """A `gather` that indexes the axes `picked` of the table and takes its other axes whole."""

  kernel_shape: tuple[int, ...]
  kernel_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
  slots: int
  n_in: int
  n_out: int
  features: tuple[int, ...]
  output_axes: tuple[int, ...]  # the axes of y: uses, then features
  picked: tuple[int, ...]
  columns: tuple[int, ...]  # the column of the indices that belongs to each picked axis
  drop: bool  # whether indices outside of the table pick nothing

  name = 'embedding'
  one_hot = True

  @classmethod
  def recognise(cls, op: Op, position: int, weight: Weight) -> Embedding | None:
    """Returns the operator if `op` looks up rows of the table in operand 0, else None."""
    if op.name != 'gather' or position != 0 or not weight.covers(op.inputs[0].shape):
      return None
    shape, numbers = op.inputs[0].shape, op.params['dimension_numbers']
    sizes = op.params['slice_sizes']
    if numbers.operand_batching_dims:
      return None
    # An axis that is taken whole may also have an index (vmap writes one that is always zero).
    picked = tuple(a for a in numbers.start_index_map if sizes[a] == 1)
    kept = tuple(a for a in range(len(shape)) if a not in picked)
    if any(sizes[a] != shape[a] for a in kept) or not picked:
      return None
    y_ndim = len(op.outputs[0].shape)
    offsets = [a for a in range(len(shape)) if a not in numbers.collapsed_slice_dims]
    place = dict(zip(offsets, numbers.offset_dims, strict=True))
    features = tuple(place[a] for a in kept)
    uses = tuple(a for a in range(y_ndim) if a not in features)
    mode = op.params['mode']
    return cls(
      kernel_shape=shape,
      kernel_axes=((), picked, kept),
      slots=1,
      n_in=math.prod(shape[a] for a in picked),
      n_out=math.prod(shape[a] for a in kept),
      features=features,
      output_axes=(*uses, *features),
      picked=picked,
      columns=tuple(numbers.start_index_map.index(a) for a in picked),
      drop=mode == lax.GatherScatterMode.FILL_OR_DROP,
    )

  def matrix(self, kernel: Array) -> Float[Array, 's i o']:
    return kernel_matrix(self, kernel)

  @property
  def examples(self) -> tuple[int, int] | None:
    uses = len(self.output_axes) - len(self.features)
    return (0, self.output_axes[0]) if uses else None

  @property
  def row_axes(self) -> tuple[int, ...]:
    return ()  # counts cannot hold a scale

  @property
  def column_axes(self) -> tuple[int, ...]:
    return self.kernel_axes[2]

  def input_diagonal(self, indices: Int[Array, '... k']) -> Float[Array, '1 i']:
    """Counts how often each row was picked."""
    there = self.present(indices).reshape(-1).astype(jnp.float32)
    return jnp.zeros((1, self.n_in), jnp.float32).at[0, self._rows(indices)].add(there)

  def scatter(self, indices: Int[Array, '... k'], y: Float[Array, '1 k o']) -> Float[Array, '1 i o']:
    """Sums the rows of y by the row of the table that was picked."""
    there = self.present(indices).reshape(1, -1, 1).astype(y.dtype)
    return jnp.zeros((1, self.n_in, y.shape[-1]), y.dtype).at[0, self._rows(indices)].add((y * there)[0])

  def _rows(self, indices: Int[Array, '... k']) -> Int[Array, ' uses']:
    row = jnp.zeros(indices.shape[:-1], jnp.int32)
    for axis, column in zip(self.picked, self.columns, strict=True):
      size = self.kernel_shape[axis]
      row = row * size + jnp.clip(indices[..., column], 0, size - 1).astype(jnp.int32)
    return row.reshape(-1)

  def present(self, indices: Int[Array, '... k']) -> Bool[Array, '1 b r']:
    """Returns which look-ups hit a row of the table."""
    inside = jnp.ones(indices.shape[:-1], bool)
    for axis, column in zip(self.picked, self.columns, strict=True):
      inside &= (indices[..., column] >= 0) & (indices[..., column] < self.kernel_shape[axis])
    inside = inside if self.drop else jnp.ones_like(inside)
    return inside.reshape(1, inside.shape[0] if inside.ndim else 1, -1)

  def mask(self, where: Array, x: Array, dy: Array) -> Array:
    """Raises CurvatureError, because rows are looked up by integers, which carry no mark."""
    raise CurvatureError('kron.used marks the input of an embedding; mark those of its readers')

  def output_rows(self, dy: Inexact[Array, '...']) -> Inexact[Array, '1 b r o']:
    uses = self.output_axes[: dy.ndim - len(self.features)]
    sizes = [1, *(dy.shape[a] for a in uses[:1]), math.prod(dy.shape[a] for a in uses[1:]), self.n_out]
    return dy.transpose(self.output_axes).reshape(sizes if uses else (1, 1, 1, self.n_out))
