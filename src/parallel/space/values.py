"""The values of a program that runs in strips, and what its rules ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from ...program import Op, bind, concrete, copies, layer_name, source_line, vary, varying
from ..mesh import MeshError
from .halo import MICROBATCH, Strip, moved, own_part

Strips = tuple[Strip | None, ...]


class SplitError(MeshError):
  """An operation that cannot run in strips; names it, its layer and its line."""


class Value(NamedTuple):
  """A value on this device: along each axis a strip of it, or all (None).

  live: whether it is of examples at all, where a pipeline has ticks in which a device has none.
  """

  x: Array
  strips: Strips
  live: Array | None = None

  @property
  def whole(self) -> bool:
    return not any(self.strips)

  @property
  def dims(self) -> list[tuple[int, Strip]]:
    """The axes in strips."""
    return [(dim, s) for dim, s in enumerate(self.strips) if s is not None]

  @property
  def shape(self) -> tuple[int, ...]:
    """That of all strips together, without padding."""
    return tuple(s.size if s is not None else n for n, s in zip(self.x.shape, self.strips, strict=True))


def whole(x: Any) -> Value:
  return Value(x, (None,) * np.ndim(x))


class Known:
  """A value that the program itself gives: an operation on numbers, done only where somebody asks."""

  def __init__(self, op: Op, inputs: Sequence[Any], place: int):
    self.op, self.inputs, self.place = op, inputs, place
    self._number: np.ndarray | None = None

  @property
  def number(self) -> np.ndarray:
    """Now, even while a function is traced."""
    if self._number is None:
      inputs = [v.number if isinstance(v, Known) else v for v in self.inputs]
      self._number = np.asarray(concrete(self.op, inputs)[self.place])
    return self._number

  def traced(self) -> Array:
    """As part of the program that is traced."""
    return anywhere(self.op, [v.traced() if isinstance(v, Known) else v for v in self.inputs])[self.place]


def anywhere(op: Op, xs: Sequence[Any]) -> list[Any]:
  """The operation, without the mesh under which it was traced."""
  return bind(op, *alike(xs), **({'sharding': None} if op.params.get('sharding') is not None else {}))


def number(value: Any) -> np.ndarray | None:
  """What the program itself says that a value is; None where it depends on the arguments."""
  if isinstance(value, Known):
    return value.number
  return None if isinstance(value, Value) else np.asarray(value)


def on_device(value: Any) -> Value:
  """Any value as one that rules compute with."""
  if isinstance(value, Value):
    return value
  return whole(value.traced() if isinstance(value, Known) else value)


def laid(value: Value, strips: Strips) -> Array:
  """A value's strips as others say: rows move where both have strips, and are picked where it is whole.

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
        raise SplitError(
          f'layers in a pipeline read an array {value.shape} of all examples; give it to them as what they carry'
        )
      x = own_part(x, dim, new)
  return x


def _is_picked(value: Value, dim: int, new: Strip) -> bool:
  return value.strips[dim] is None and value.x.shape[dim] == new.size and (new.size, new.rows) != (1, 1)


def beside(value: Value, strips: Strips, shape: Sequence[int]) -> Array:
  """As `laid`, of an operand of an operation entry by entry whose other operands have this shape.

  What every example has in common, such as a parameter of each place, is first repeated for each of them, so that
  `kron.curvature` sees how an example uses it.
  """
  picked = any(s is not None and _is_picked(value, d, s) for d, s in enumerate(strips) if d)
  x = value.x
  if value.whole and picked and x.shape[0] == 1 and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact):
    return laid(value._replace(x=copies(jax.numpy.broadcast_to(x, (shape[0], *x.shape[1:])))), strips)
  return laid(value, strips)


def common(values: Sequence[Value], op: Op) -> Strips:
  """The strips that values of one shape are to have together: those of the first that has some, axis by axis."""
  found: list[Strip | None] = []
  for own in zip(*(v.strips for v in values), strict=True):
    there = [s for s in own if s is not None]
    found.append(there[0] if there else None)
    if len({s.axis for s in there}) > 1:
      refuse(op, f'its operands lie along {" and ".join(sorted({s.axis for s in there}))}')
  axes = [s.axis for s in found if s is not None]
  if len(set(axes)) < len(axes):
    refuse(op, f'two axes of its result would lie along {max(set(axes), key=axes.count)}')
  return tuple(found)


def bound(op: Op, xs: Sequence[Array]) -> list[Array]:
  """The operation on these arrays, all said to differ between the same devices."""
  return bind(op, *alike(xs))


def alike(xs: Sequence[Array]) -> list[Array]:
  """All said to differ between the same devices; gradients of those that did not are summed in at least float32."""
  axes = frozenset().union(*(varying(x) for x in xs))
  xs = [jax.numpy.asarray(x) if axes else x for x in xs]
  return [vary(_wide(x), axes).astype(x.dtype) if axes - varying(x) else x for x in xs]


def summed(x: Array, axes: tuple[str, ...]) -> Array:
  """The sum over these mesh axes, in at least float32: XLA's own widening of 16-bit sums fails on some meshes."""
  return jax.lax.psum(_wide(x), axes).astype(x.dtype)


def _wide(x: Array) -> Array:
  narrow = jax.numpy.issubdtype(x.dtype, jax.numpy.floating) and x.dtype.itemsize < 4
  return x.astype(jax.numpy.float32) if narrow else x


def refuse(op: Op, why: str) -> None:
  """Raises SplitError: what cannot be done, in which layer, where, and what to change."""
  layer = layer_name(op)
  where = f'layer {layer!r}, ' if layer else ''
  raise SplitError(
    f'{where}{op.name} at {source_line(op)} cannot run in strips: {why}; change the layer, or leave the mesh without '
    f'that axis'
  )


def index(strip: Strip) -> Array:
  return jax.lax.axis_index(strip.axis)
