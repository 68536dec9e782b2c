"""Divides axes of arrays into strips, one for each device along a mesh axis, and exchanges rows between neighbours.

All of it runs inside of a shard_map. A pure function of sizes (`journeys`) decides which rows travel, so that it can be
tested, and its bytes counted, without devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ...program import vary, varying

Ints = Sequence[int] | Int[np.ndarray, ' n']  # one for each device


class Strip(NamedTuple):
  """Describes how an axis is divided over the devices of a mesh axis, in order and as evenly as possible.

  The rows of device i begin at row unit * ceil(i * (size / unit) / shards). A stride of two halves an axis; the strips
  of the axis and of its half then begin at the same places of the image. The stride therefore makes no window read
  additional rows of other devices. Each strip has room for `rows` rows. The unused end of a strip is padding, whose
  values are undefined.

  Attributes:
    axis: the name of the mesh axis.
    shards: the number of devices along it.
    size: the length of the divided axis.
    unit: a divisor of size; runs of `unit` rows are never parted.
  """

  axis: str
  shards: int
  size: int
  unit: int = 1

  @property
  def bounds(self) -> Int[np.ndarray, ' n']:
    """Returns the first row of each device, followed by the number of all rows."""
    return -(-np.arange(self.shards + 1) * (self.size // self.unit) // self.shards) * self.unit

  @property
  def firsts(self) -> Int[np.ndarray, ' shards']:
    return self.bounds[:-1]

  @property
  def counts(self) -> Int[np.ndarray, ' shards']:
    """Returns the number of rows of each device."""
    return np.diff(self.bounds)

  @property
  def rows(self) -> int:
    """Returns the number of rows for which each device has room."""
    return -(-self.size // self.unit // self.shards) * self.unit

  @property
  def even(self) -> bool:
    return self.shards * self.rows == self.size

  @property
  def places(self) -> Int[np.ndarray, ' n']:
    """Returns the row at each place of all strips together; -1 stands for padding."""
    at = np.arange(self.rows)
    return np.where(at < self.counts[:, None], self.firsts[:, None] + at, -1).reshape(-1)

  def of(self, size: int) -> Strip:
    """Returns the strip of another axis, of length `size`, over the same devices."""
    return self if size == self.size else Strip(self.axis, self.shards, size)


MICROBATCH = 'microbatch'  # the axis of strips that a pipeline runs one after another, instead of devices side by side


class Journey(NamedTuple):
  """Rows that go from device i + `shift` to device i, the same number for each receiver.

  starts: the first row within the sender's rows, by receiver.
  places: the first row within the receiver's result, by receiver.
  """

  shift: int
  length: int
  receivers: tuple[int, ...]
  starts: tuple[int, ...]
  places: tuple[int, ...]


def journeys(strip: Strip, first: Ints, counts: Ints) -> list[Journey]:
  """Returns the rows that must travel so that device i has rows first[i] to first[i] + counts[i], and no others.

  No device sends rows that are outside of the array. Journeys with shift 0 stay on their device.
  """
  bounds, by_shift = strip.bounds, {}
  for i in range(strip.shards):
    for j in range(strip.shards):
      low = max(first[i], bounds[j])
      high = min(first[i] + counts[i], bounds[j + 1])
      if high > low:
        key = (j - i, int(high - low))
        by_shift.setdefault(key, []).append((i, int(low - bounds[j]), int(low - first[i])))
  return [
    Journey(shift, length, *map(tuple, zip(*moves, strict=True))) for (shift, length), moves in sorted(by_shift.items())
  ]


def fetch(x: Array, dim: int, strip: Strip, first: Ints, counts: Ints) -> Array:
  """Brings rows first[i] to first[i] + counts[i] of the whole array along `dim` to device i; missing rows are zeros.

  The result has as many rows as the largest count, and at least one. Rows after a device's count hold any finite
  numbers.
  """
  x, length = cleared(x, dim, strip), int(max(*counts, 1))
  moves = journeys(strip, first, counts)
  if _tile(moves):
    return _tiled(_zeros(x, dim, length), dim, [(_sent(x, dim, strip, j), j) for j in moves])
  total = _kept(x, dim, strip, first, length)
  for j in moves:
    if j.shift:
      total = _added(total, dim, _sent(x, dim, strip, j), _by_device(j.places, j.receivers, strip))
  return total


def _tiled(nothing: Array, dim: int, parts: list[tuple[Array, Journey]]) -> Array:
  """Puts parts beside each other, each at the one place that all its receivers share."""
  pieces, at = [], 0
  for piece, j in sorted(parts, key=lambda part: part[1].places[0]):
    pieces += [lax.slice_in_dim(nothing, at, j.places[0], axis=dim), piece]
    at = j.places[0] + j.length
  pieces.append(lax.slice_in_dim(nothing, at, None, axis=dim))
  return lax.concatenate([p for p in pieces if p.shape[dim]], dim)


def _kept(x: Array, dim: int, strip: Strip, first: Ints, length: int) -> Array:
  """Puts a device's rows where they belong in its result, which begins at first[i]; the rest is zeros."""
  at = np.clip(strip.firsts - first, -strip.rows, length)
  low, high = max(int(at.max()), 0), max(length - strip.rows - int(at.min()), 0)
  x = lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) if d == dim else (0, 0, 0) for d in range(x.ndim)])
  if len(set(at)) == 1:
    return lax.slice_in_dim(x, low - int(at[0]), low - int(at[0]) + length, axis=dim)
  return lax.dynamic_slice_in_dim(x, own(low - at, strip), length, dim)


def _added(total: Array, dim: int, piece: Array, place: Int[Array, '']) -> Array:
  """Adds the piece to the rows from `place` on, by a scatter.

  A scatter is its own derivative; an update in place is not.
  """
  if total.dtype == jnp.bool_:
    return _added(total.astype(jnp.int8), dim, piece.astype(jnp.int8), place).astype(jnp.bool_)
  numbers = lax.ScatterDimensionNumbers(tuple(range(total.ndim)), (), (dim,))
  axes = varying(total) | varying(piece) | varying(place)
  return lax.scatter_add(
    vary(total, axes), vary(place[None], axes), vary(piece, axes), numbers, indices_are_sorted=True,
    unique_indices=True, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )  # fmt: skip


def _tile(parts: list[Journey]) -> bool:
  """Tells whether every part has one place, and no two parts have the same rows."""
  if not parts or any(len(set(j.places)) > 1 for j in parts):
    return False
  ends = sorted((j.places[0], j.places[0] + j.length) for j in parts)
  return all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def _sent(x: Array, dim: int, strip: Strip, j: Journey) -> Array:
  """Returns what arrives at each device; devices that are not receivers get zeros."""
  n = strip.shards
  senders = [i + j.shift for i in j.receivers]
  if len(set(j.starts)) == 1:
    piece = lax.slice_in_dim(x, j.starts[0], j.starts[0] + j.length, axis=dim)
  else:
    piece = lax.dynamic_slice_in_dim(x, _by_device(j.starts, senders, strip), j.length, dim)
  if j.shift:
    return lax.ppermute(piece, strip.axis, list(zip(senders, j.receivers, strict=True)))
  if len(j.receivers) == n:
    return piece
  receives = np.isin(np.arange(n), j.receivers)
  return jnp.where(own(receives, strip), piece, jnp.zeros((), piece.dtype))


def _by_device(values: Ints, devices: Ints, strip: Strip) -> Int[Array, '']:
  """Returns this device's value; 0 on devices that have none."""
  table = np.zeros(strip.shards, np.int32)
  table[list(devices)] = values
  return own(table, strip)


def _zeros(x: Array, dim: int, count: int) -> Array:
  shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
  return vary(jnp.zeros(shape, x.dtype), varying(x))


def own(table: np.ndarray, strip: Strip) -> Array:
  """Returns this device's entry of a table with an entry for every device."""
  return jnp.asarray(table)[lax.axis_index(strip.axis)]


def there(strip: Strip) -> Bool[Array, ' rows']:
  """Tells which of this device's rows are not padding."""
  return jnp.arange(strip.rows) < own(strip.counts, strip)


def along(rows: Array, dim: int, ndim: int) -> Array:
  """Reshapes a vector of rows so that it broadcasts against an array."""
  return rows.reshape((1,) * dim + rows.shape + (1,) * (ndim - dim - 1))


def cleared(x: Array, dim: int, strip: Strip, fill: float = 0.0) -> Array:
  """Fills all rows of padding with one number."""
  if strip.even:
    return x
  return jnp.where(along(there(strip), dim, x.ndim), x, jnp.asarray(fill, x.dtype))


def own_part(x: Array, dim: int, strip: Strip) -> Array:
  """Returns this device's rows of an array that every device has."""
  missing = int(strip.firsts[-1]) + strip.rows - strip.size
  if missing:
    x = jnp.pad(x, [(0, missing if a == dim else 0) for a in range(x.ndim)])
  return lax.dynamic_slice_in_dim(x, own(strip.firsts, strip), strip.rows, dim)


def moved(x: Array, dim: int, old: Strip, new: Strip) -> Array:
  """Moves rows from one layout over the devices to another."""
  same = old.rows == new.rows and (old.bounds == new.bounds).all()
  return x if same else fetch(x, dim, old, new.firsts, new.counts)


def packed(x: Array, dim: int, strip: Strip) -> Array:
  """Moves all padding behind the last row of all strips together."""
  first = np.minimum(np.arange(strip.shards) * strip.rows, strip.size)
  return x if strip.even else fetch(x, dim, strip, first, np.diff([*first, strip.size]))
