"""The values of a program that runs in strips, and the helpers of its rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from ...program import Op, Operand, bind, concrete, copies, layer_name, source_line, vary, varying
from ..mesh import MeshError
from .halo import MICROBATCH, Strip, moved, own_part

Strips = tuple[Strip | None, ...]


class PartitionError(MeshError):
  """Reports an operation that cannot run in strips; the message names it, its layer and its line."""


class Value(NamedTuple):
  """A value on this device: along each axis it has one strip, or everything (None).

  live: whether the value belongs to examples at all; in some ticks of a pipeline a device has none.
  """

  x: Array
  strips: Strips
  live: Array | None = None

  @property
  def whole(self) -> bool:
    return not any(self.strips)

  @property
  def dims(self) -> list[tuple[int, Strip]]:
    """Returns the axes in strips, each with its strip."""
    return [(dim, s) for dim, s in enumerate(self.strips) if s is not None]

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of all strips together, without padding."""
    return tuple(s.size if s is not None else n for n, s in zip(self.x.shape, self.strips, strict=True))


def whole(x: Any) -> Value:
  return Value(x, (None,) * np.ndim(x))


class Known:
  """A value that the program itself determines: an operation on numbers, which runs only if its result is read."""

  def __init__(self, op: Op, inputs: Sequence[Any], place: int):
    self.op, self.inputs, self.place = op, inputs, place
    self._number: np.ndarray | None = None

  @property
  def number(self) -> np.ndarray:
    """Computes the number at once, even while a function is traced."""
    if self._number is None:
      inputs = [v.number if isinstance(v, Known) else v for v in self.inputs]
      self._number = np.asarray(concrete(self.op, inputs)[self.place])
    return self._number

  def traced(self) -> Array:
    """Computes the number as part of the program that is traced."""
    return anywhere(self.op, [v.traced() if isinstance(v, Known) else v for v in self.inputs])[self.place]


def anywhere(op: Op, xs: Sequence[Any]) -> list[Any]:
  """Runs an operation without the mesh under which it was traced."""
  return bind(op, *alike(xs), **({'sharding': None} if op.params.get('sharding') is not None else {}))


def number(value: Any) -> np.ndarray | None:
  """Returns the number that a value has in the program itself; None if it depends on the arguments."""
  if isinstance(value, Known):
    return value.number
  return None if isinstance(value, Value) else np.asarray(value)


def on_device(value: Any) -> Value:
  """Converts any value to a `Value`, with which rules compute."""
  if isinstance(value, Value):
    return value
  return whole(value.traced() if isinstance(value, Known) else value)


def laid(value: Value, strips: Strips) -> Array:
  """Lays a value in the given strips: rows move if it has strips already, and are picked if it is whole.

  Axes of length 1 stay as they are: an operation repeats them, or else all but one device have padding there.
  """
  x = value.x
  for dim, (old, new) in enumerate(zip(value.strips, strips, strict=True)):
    if new is None:
      continue
    if old is not None:
      x = moved(x, dim, old, new)
    elif _is_picked(value, dim, new):
      if new.axis == MICROBATCH:
        raise PartitionError(
          f'layers in a pipeline read an array {value.shape} of all examples; give it to them as what they carry'
        )
      x = own_part(x, dim, new)
  return x


def _is_picked(value: Value, dim: int, new: Strip) -> bool:
  return value.strips[dim] is None and value.x.shape[dim] == new.size and (new.size, new.rows) != (1, 1)


def beside(value: Value, strips: Strips, shape: Sequence[int]) -> Array:
  """Lays out an operand, like `laid`, for an elementwise operation whose other operands have the given shape.

  An operand that all examples have in common, such as a parameter for each place, is first repeated for each example,
  so that `kron.curvature` sees how an example uses it.
  """
  picked = any(s is not None and _is_picked(value, d, s) for d, s in enumerate(strips) if d)
  x = value.x
  if value.whole and picked and x.shape[0] == 1 and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact):
    return laid(value._replace(x=copies(jax.numpy.broadcast_to(x, (shape[0], *x.shape[1:])))), strips)
  return laid(value, strips)


def common(values: Sequence[Value], op: Op) -> Strips:
  """Returns the strips that values of one shape share: on each axis those of the first value that has some."""
  shared: list[Strip | None] = []
  for strips in zip(*(v.strips for v in values), strict=True):
    there = [s for s in strips if s is not None]
    shared.append(there[0] if there else None)
    if len({s.axis for s in there}) > 1:
      refuse(op, f'its operands lie along {" and ".join(sorted({s.axis for s in there}))}')
  axes = [s.axis for s in shared if s is not None]
  if len(set(axes)) < len(axes):
    refuse(op, f'two axes of its result would lie along {max(set(axes), key=axes.count)}')
  return tuple(shared)


def bound(op: Op, xs: Sequence[Operand]) -> list[Array]:
  """Runs the operation on these arrays, all marked as varying over the same devices."""
  return bind(op, *alike(xs))


def alike(xs: Sequence[Operand]) -> list[Operand]:
  """Marks all arrays as varying over the same devices; gradients of newly marked ones are summed in float32 or more."""
  axes = frozenset().union(*(varying(x) for x in xs))
  xs = [jax.numpy.asarray(x) if axes else x for x in xs]
  return [vary(_wide(x), axes).astype(x.dtype) if axes - varying(x) else x for x in xs]


def summed(x: Array, axes: tuple[str, ...]) -> Array:
  """Returns the sum over mesh axes in at least float32, as XLA's widening of 16-bit sums fails on some meshes."""
  return jax.lax.psum(_wide(x), axes).astype(x.dtype)


def _wide(x: Operand) -> Operand:
  narrow = jax.numpy.issubdtype(x.dtype, jax.numpy.floating) and x.dtype.itemsize < 4
  return x.astype(jax.numpy.float32) if narrow else x


def refuse(op: Op, why: str) -> None:
  """Raises PartitionError, which says what cannot run, in which layer and line, and what to change."""
  layer = layer_name(op)
  where = f'layer {layer!r}, ' if layer else ''
  raise PartitionError(
    f'{where}{op.name} at {source_line(op)} cannot run in strips: {why}; change the layer, or leave the mesh without '
    f'that axis'
  )


def index(strip: Strip) -> Array:
  return jax.lax.axis_index(strip.axis)
