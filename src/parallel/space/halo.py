"""An axis of an array in strips, one for each device along a mesh axis, and how rows travel between neighbours.

All of it runs inside of a shard_map. Which rows travel is a pure function of sizes (`journeys`), so that it is tested, and
its bytes are counted, without devices.
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


class Strip(NamedTuple):
  """How an axis of length `size` lies over the `shards` devices of a mesh axis: `rows` on each, in order.

  Where `shards * rows` is more than `size` the last devices have rows of padding, which hold anything.
  """

  axis: str
  shards: int
  size: int
  rows: int

  @property
  def even(self) -> bool:
    return self.shards * self.rows == self.size

  @property
  def firsts(self) -> Int[np.ndarray, ' shards']:
    """The first row of each device."""
    return np.arange(self.shards) * self.rows

  def of(self, size: int) -> Strip:
    """Another axis over the same devices, in equal strips."""
    return self._replace(size=size, rows=-(-size // self.shards))


MICROBATCH = 'microbatch'  # the axis of strips that are no devices' but a pipeline's, one after another


class Journey(NamedTuple):
  """Rows that go from device i + `shift` to device i, the same number for each of the receivers.

  starts: in the sender's own rows; places: in the receiver's result; both by receiver.
  """

  shift: int
  length: int
  receivers: tuple[int, ...]
  starts: tuple[int, ...]
  places: tuple[int, ...]


def journeys(strip: Strip, first: Sequence[int], count: int) -> list[Journey]:
  """What must travel so that device i has rows first[i] to first[i] + count; none travels that is not needed.

  Rows outside of the array come from nowhere. Those with shift 0 stay.
  """
  own, found = strip.firsts, {}
  for i in range(strip.shards):
    for j in range(strip.shards):
      low = max(first[i], own[j])
      high = min(first[i] + count, own[j] + strip.rows, strip.size)
      if high > low:
        key = (j - i, int(high - low))
        found.setdefault(key, []).append((i, int(low - own[j]), int(low - first[i])))
  return [
    Journey(shift, length, *map(tuple, zip(*moves, strict=True))) for (shift, length), moves in sorted(found.items())
  ]


def fetch(x: Array, dim: int, strip: Strip, first: Sequence[int], count: int) -> Array:
  """Rows first[i] to first[i] + count of the whole array along `dim` on device i; zeros where there are none."""
  x = cleared(x, dim, strip)
  parts = [(_sent(x, dim, strip, j), j) for j in journeys(strip, first, count)]
  here = lax.axis_index(strip.axis)
  if _tile([j for _, j in parts]):
    parts.sort(key=lambda part: part[1].places[0])
    pieces, at = [], 0
    for piece, j in parts:
      pieces += [_zeros(x, dim, j.places[0] - at)] if j.places[0] > at else []
      pieces.append(piece)
      at = j.places[0] + j.length
    pieces += [_zeros(x, dim, count - at)] if count > at else []
    return lax.concatenate(pieces, dim) if len(pieces) > 1 else pieces[0]
  total = _zeros(x, dim, count)
  for piece, j in parts:
    place = _by_device(j.places, j.receivers, strip.shards)[here]
    placed = lax.dynamic_update_slice_in_dim(_zeros(x, dim, count), piece, place, dim)
    total = total | placed if x.dtype == jnp.bool_ else total + placed
  return total


def _tile(parts: list[Journey]) -> bool:
  """Whether every part has one place, and no two of them the same rows."""
  if any(len(set(j.places)) > 1 for j in parts):
    return False
  ends = sorted((j.places[0], j.places[0] + j.length) for j in parts)
  return all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def _sent(x: Array, dim: int, strip: Strip, j: Journey) -> Array:
  """What arrives at each device; zeros at those that are no receivers."""
  n, here = strip.shards, lax.axis_index(strip.axis)
  senders = [i + j.shift for i in j.receivers]
  if len(set(j.starts)) == 1:
    piece = lax.slice_in_dim(x, j.starts[0], j.starts[0] + j.length, axis=dim)
  else:
    start = _by_device(j.starts, senders, n)[here]
    piece = lax.dynamic_slice_in_dim(x, start, j.length, dim)
  if j.shift:
    return lax.ppermute(piece, strip.axis, list(zip(senders, j.receivers, strict=True)))
  if len(j.receivers) == n:
    return piece
  receives = np.isin(np.arange(n), j.receivers)
  return jnp.where(jnp.asarray(receives)[here], piece, jnp.zeros((), piece.dtype))


def _by_device(values: Sequence[int], devices: Sequence[int], n: int) -> Int[Array, ' n']:
  table = np.zeros(n, np.int32)
  table[list(devices)] = values
  return jnp.asarray(table)


def _zeros(x: Array, dim: int, count: int) -> Array:
  shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
  return vary(jnp.zeros(shape, x.dtype), varying(x))


def there(strip: Strip) -> Bool[Array, ' rows']:
  """Which of this device's rows are no padding."""
  return lax.axis_index(strip.axis) * strip.rows + jnp.arange(strip.rows) < strip.size


def along(rows: Array, dim: int, ndim: int) -> Array:
  """A vector of rows, to be put beside an array."""
  return rows.reshape((1,) * dim + rows.shape + (1,) * (ndim - dim - 1))


def cleared(x: Array, dim: int, strip: Strip, fill: float = 0.0) -> Array:
  """With one number in all rows of padding."""
  if strip.even:
    return x
  return jnp.where(along(there(strip), dim, x.ndim), x, jnp.asarray(fill, x.dtype))


def own_part(x: Array, dim: int, strip: Strip) -> Array:
  """This device's rows of an array that every device has."""
  missing = strip.shards * strip.rows - strip.size
  if missing:
    x = jnp.pad(x, [(0, missing if a == dim else 0) for a in range(x.ndim)])
  return lax.dynamic_slice_in_dim(x, lax.axis_index(strip.axis) * strip.rows, strip.rows, dim)


def moved(x: Array, dim: int, old: Strip, new: Strip) -> Array:
  """From one way to lie over the devices to another, of the same rows."""
  return x if old.rows == new.rows else fetch(x, dim, old, new.firsts.tolist(), new.rows)
