"""Streams of bits, most significant first, and the codes of the packed file."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int, UInt8

from .errors import EdgeError

TRITS = 5  # in a byte: 3^5 = 243
PLAIN = 0  # the code of five weights to a byte; code k + 1 is Rice's with k bits of remainder
MOST_CODE = 16


class Writer:
  """Collects numbers as bits."""

  def __init__(self) -> None:
    self._parts: list[np.ndarray] = []

  def bits(self, values: UInt8[np.ndarray, ' n']) -> None:
    self._parts.append(values.astype(np.uint8))

  def numbers(self, values: Int[np.ndarray, ' n'], width: int) -> None:
    """Writes numbers 0 ... 2^width - 1."""
    if width:
      self.bits(np.asarray(values, np.int64)[:, None] >> np.arange(width - 1, -1, -1) & 1)

  def data(self) -> bytes:
    flat = [p.ravel() for p in self._parts]
    return np.packbits(np.concatenate(flat) if flat else np.zeros(0, np.uint8)).tobytes()


class Reader:
  """Reads numbers from bits, and refuses to read past their end."""

  def __init__(self, data: bytes) -> None:
    self._bits = np.unpackbits(np.frombuffer(data, np.uint8))
    self._at = 0

  def bits(self, count: int) -> UInt8[np.ndarray, ' count']:
    if count > len(self._bits) - self._at:
      raise EdgeError('its bits end too early')
    self._at += count
    return self._bits[self._at - count : self._at]

  def numbers(self, count: int, width: int) -> Int[np.ndarray, ' count']:
    rows = self.bits(count * width).reshape(count, width).astype(np.int64)
    return rows @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))

  def unary(self, count: int) -> Int[np.ndarray, ' count']:
    """Reads numbers that are written as so many zeros and a one."""
    ones = np.flatnonzero(self._bits[self._at :])[:count]
    if len(ones) < count:
      raise EdgeError('its bits end too early')
    self._at += int(ones[-1]) + 1 if count else 0
    return np.diff(ones, prepend=-1) - 1

  def check_end(self) -> None:
    """Raises EdgeError unless less than a byte of zeros is left."""
    left = self._bits[self._at :]
    if len(left) > 7 or left.any():
      raise EdgeError('it is longer than its network')


def width_of(values: Int[np.ndarray, '*shape']) -> int:
  """Returns the bits of the largest of some numbers that are not negative."""
  return int(values.max()).bit_length() if values.size else 0


def write_ternary(out: Writer, flat: Int[np.ndarray, ' n'], code: int) -> None:
  """Writes weights in {-1, 0, 1} by a code: the gaps before nonzero weights by Rice's code, then their signs."""
  if code == PLAIN:
    trits = np.pad(flat + 1, (0, -len(flat) % TRITS), constant_values=1).reshape(-1, TRITS)
    out.numbers(trits @ 3 ** np.arange(TRITS), 8)
    return
  places = np.flatnonzero(flat)
  gaps, rest = np.diff(places, prepend=-1) - 1, code - 1
  high = gaps >> rest
  unary = np.zeros(int(high.sum()) + len(high), np.uint8)
  unary[np.cumsum(high + 1) - 1] = 1
  out.bits(unary)
  out.numbers(gaps & ((1 << rest) - 1), rest)
  out.bits(flat[places] > 0)


def read_ternary(source: Reader, size: int, nonzero: int, code: int) -> Int[np.ndarray, ' size']:
  """Reads `size` weights, of which `nonzero` are not zero.

  Raises:
    EdgeError: the bits are not those of such weights.
  """
  if code == PLAIN:
    groups = source.numbers(-(-size // TRITS), 8)
    if (groups >= 3**TRITS).any():
      raise EdgeError('a byte holds more than five weights')
    return (groups[:, None] // 3 ** np.arange(TRITS) % 3).ravel()[:size] - 1
  high = source.unary(nonzero)
  if (high > size).any():  # before they are shifted, which could overflow
    raise EdgeError('a weight lies outside of its layer')
  places = np.cumsum((high << (code - 1)) + source.numbers(nonzero, code - 1) + 1) - 1
  if nonzero and places[-1] >= size:
    raise EdgeError('a weight lies outside of its layer')
  flat = np.zeros(size, np.int64)
  flat[places] = 2 * source.bits(nonzero).astype(np.int64) - 1
  return flat


def best_code(flat: Int[np.ndarray, ' n']) -> int:
  """Returns the code that takes the fewest bits."""
  places = np.flatnonzero(flat)
  gaps = np.diff(places, prepend=-1) - 1
  sizes = {PLAIN: 8 * math.ceil(len(flat) / TRITS)}
  sizes |= {k + 1: int((gaps >> k).sum()) + len(gaps) * (k + 2) for k in range(MOST_CODE)}
  return min(sizes, key=lambda code: sizes[code])
