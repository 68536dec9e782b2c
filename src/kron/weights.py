"""Values that are linear in one parameter: how a weight looks after casts, reshapes, transposes and scalings."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

# A transposition followed by a reshape. A chain of them leads from a parameter to its matrix and, inverted, back.
Move = tuple[tuple[int, ...], tuple[int, ...]]


def move(moves: tuple[Move, ...], x: Array) -> Array:
  for perm, shape in moves:
    x = x.transpose(perm).reshape(shape)
  return x


def move_back(moves: tuple[Move, ...], shape: tuple[int, ...], x: Array) -> Array:
  """Undoes `move`, for a parameter of the given shape."""
  before = [shape]
  for _, after in moves:
    before.append(after)
  for (perm, _), start in zip(reversed(moves), reversed(before[:-1]), strict=True):
    x = x.reshape([start[p] for p in perm]).transpose(tuple(int(i) for i in np.argsort(perm)))
  return x


class Weight(NamedTuple):
  """A value whose every entry is one entry of a parameter times a coefficient (plus, perhaps, a constant).

  The parameter after `moves` has the shape `core`. Axis i of the value runs along core axis `dims[i]`; along None it
  repeats. The coefficient is the number `scale` unless the value met arrays on its way (`met` counts those meetings);
  `meeting` is the last multiplication of these, named by its output.
  """

  param: int
  moves: tuple[Move, ...]
  core: tuple[int, ...]
  dims: tuple[int | None, ...]
  scale: float = 1.0
  met: int = 0
  meeting: int | None = None
  spread: bool = False  # repeated since the last meeting

  @classmethod
  def of(cls, param: int, shape: tuple[int, ...]) -> Weight:
    return cls(param, (), tuple(shape), tuple(range(len(shape))))

  def transposed(self, perm: tuple[int, ...]) -> Weight:
    return self._replace(dims=tuple(self.dims[p] for p in perm))

  def broadcast(self, old: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...]) -> Weight:
    """After lax.broadcast_in_dim of a value of shape `old`."""
    dims: list[int | None] = [None] * len(shape)
    spread = self.spread or (self.met > 0 and math.prod(shape) > math.prod(old))
    for source, axis in enumerate(axes):
      if old[source] == shape[axis]:
        dims[axis] = self.dims[source]
    return self._replace(dims=tuple(dims), spread=spread)

  def reshaped(self, old: tuple[int, ...], shape: tuple[int, ...]) -> Weight | None:
    """After a reshape; None where repeated axes would be merged with the parameter's own."""
    long = [(size, d) for size, d in zip(old, self.dims, strict=True) if size != 1]
    if [size for size, _ in long] == [size for size in shape if size != 1]:  # only axes of length one come or go
      source = iter(long)
      return self._replace(dims=tuple(None if size == 1 else next(source)[1] for size in shape))
    if any(d is None for _, d in long) or self.met:
      return None
    perm = [d for _, d in long]
    perm += [d for d in range(len(self.core)) if d not in perm]  # of length one
    return self._replace(
      moves=(*self.moves, (tuple(perm), tuple(shape))), core=tuple(shape), dims=tuple(range(len(shape)))
    )

  def covers(self, shape: tuple[int, ...]) -> bool:
    """Whether a value of this shape holds every entry of the parameter once."""
    return all(d is not None or size == 1 for d, size in zip(self.dims, shape, strict=True))

  def channels(self) -> tuple[int, ...]:
    """The axes of the value that run along the parameter."""
    return tuple(axis for axis, d in enumerate(self.dims) if d is not None)

  def matrix_moves(self, *groups: tuple[int, ...]) -> tuple[Move, ...]:
    """Moves from the parameter to one axis for each group of this value's axes (length one where a group is empty)."""
    axes = [[self.dims[i] for i in group if self.dims[i] is not None] for group in groups]
    sizes = [math.prod(self.core[d] for d in group) for group in axes]
    used = [d for group in axes for d in group]
    rest = [d for d in range(len(self.core)) if d not in used]
    assert all(self.core[d] == 1 for d in rest), (self, groups)
    return (*self.moves, (tuple(used + rest), tuple(sizes)))
