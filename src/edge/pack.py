"""Packed files: a network of integers in as few bytes as its weights' entropy allows, with a checksum.

A file has, in this order (numbers of several bytes have the least significant first):

  'KMT1'          4 bytes
  head            input bits 1, height 2, width 2, channels 2, layers 1, outputs 2, by place 1, head bits 1, scale f32
  for each layer  width 2, kernel 1, stride 1, pool 1, flags 1 (1: depthwise, 2: adds), added stream 1, bits 1,
                  then a block
  a block         code 1, nonzero weights 3, bits of a multiplier 1, least shift 1, bits of a shift 1, bits of an offset 1
  for the head    a block
  the bits        of each layer: weights, multipliers, shifts less the least, offsets as two's complement; then the head's
  CRC-32          4 bytes, of all before

Weights of {-1, 0, 1} are coded as `bits` says; those of a fixed-point head are 8-bit numbers.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np

from .. import files
from . import layers
from .bits import MOST_CODE, Reader, Writer, best_code, read_ternary, width_of, write_ternary
from .errors import EdgeError
from .layers import Conv, Head, Network, Numbers, Plan

MAGIC = b'KMT1'
_START = struct.Struct('<BHHHBHBBf')
_LAYER = struct.Struct('<HBBBBBB')
_BLOCK = struct.Struct('<B3sBBBB')
MOST_FILE = 2**30
MOST_WEIGHTS = 2**24  # of a network; no FPGA holds as many
DEPTHWISE, ADDS = 1, 2


def packed(network: Network) -> bytes:
  """Returns a network's file.

  Raises:
    EdgeError: a number of the network is outside of what the format holds.
  """
  layers.check(network)
  plan, bits = network.plan, Writer()
  head_bits = 2 if np.isin(network.head.weights, (-1, 0, 1)).all() else 8
  try:
    start = (plan.bits, *network.shape, len(plan.convs), plan.outputs, plan.by_place, head_bits, network.head.scale)
    out = [MAGIC, _START.pack(*start)]
    for conv, numbers in zip(plan.convs, network.layers, strict=True):
      flags = DEPTHWISE * conv.depthwise + ADDS * (conv.add is not None)
      out.append(_LAYER.pack(conv.width, conv.kernel, conv.stride, conv.pool, flags, conv.add or 0, conv.bits))
      out.append(_write(bits, numbers, 2))
    head = network.head
    none = np.zeros(plan.outputs, np.int64)
    out.append(_write(bits, Numbers(head.weights, none, head.offset, none), head_bits))
  except struct.error as error:
    raise EdgeError(f'the network does not fit the format of packed files: {error}') from error
  data = b''.join(out) + bits.data()
  return data + struct.pack('<I', zlib.crc32(data))


def _write(bits: Writer, numbers: Numbers, weight_bits: int) -> bytes:
  """Writes a layer's numbers and returns its block."""
  flat = np.asarray(numbers.weights, np.int64).ravel()
  if weight_bits == 2:
    code = best_code(flat)
    write_ternary(bits, flat, code)
  else:
    code = 0
    bits.numbers(flat & 255, 8)
  multiplier, offset, shift = (np.asarray(n, np.int64) for n in numbers[1:])
  least = int(shift.min())
  widths = width_of(multiplier), width_of(shift - least), width_of(np.where(offset < 0, ~offset, offset)) + 1
  bits.numbers(multiplier, widths[0])
  bits.numbers(shift - least, widths[1])
  bits.numbers(offset & ((1 << widths[2]) - 1), widths[2])
  return _BLOCK.pack(code, int(np.count_nonzero(flat)).to_bytes(3, 'little'), widths[0], least, widths[1], widths[2])


def unpacked(data: bytes) -> Network:
  """Returns the network of a file's bytes.

  Raises:
    EdgeError: the bytes are not those of a packed network.
  """
  if data[:4] != MAGIC:
    raise EdgeError('it does not begin with KMT1, as packed networks do')
  if len(data) < 8 + _START.size or zlib.crc32(data[:-4]) != struct.unpack('<I', data[-4:])[0]:
    raise EdgeError('its checksum is wrong; it is cut off or damaged')
  try:
    return _parsed(data[4:-4])
  except struct.error as error:
    raise EdgeError('its head ends too early') from error


def _parsed(data: bytes) -> Network:
  in_bits, height, width, channels, count, outputs, by_place, head_bits, scale = _START.unpack_from(data)
  at, convs, blocks = _START.size, [], []
  for _ in range(count):
    wide, kernel, stride, pool, flags, added, bits = _LAYER.unpack_from(data, at)
    add = added if flags & ADDS else None
    convs.append(Conv(wide, kernel, stride, pool, bool(flags & DEPTHWISE), add, bits))
    blocks.append(_BLOCK.unpack_from(data, at + _LAYER.size))
    at += _LAYER.size + _BLOCK.size
  blocks.append(_BLOCK.unpack_from(data, at))
  plan, shape = Plan(tuple(convs), outputs, in_bits, bool(by_place)), (height, width, channels)
  _check_head(plan, shape, head_bits, scale)
  places = layers.shapes(plan, shape)
  of = [(c.kernel, c.kernel, 1 if c.depthwise else p[2], c.width) for c, p in zip(convs, places, strict=False)]
  of.append((places[-1][2], outputs))
  if (size := sum(map(math.prod, of))) > MOST_WEIGHTS:
    raise EdgeError(f'its head speaks of {size:,} weights, more than {MOST_WEIGHTS:,}')
  source = Reader(data[at + _BLOCK.size :])
  *numbers, read = [_read(source, s, b, head_bits if len(s) == 2 else 2) for s, b in zip(of, blocks, strict=True)]
  source.check_end()
  return layers.check(Network(plan, shape, tuple(numbers), Head(read.weights, read.offset, scale)))


def _check_head(plan: Plan, shape: tuple[int, int, int], head_bits: int, scale: float) -> None:
  whole = [*shape, plan.outputs, *(n for c in plan.convs for n in (c.width, c.kernel, c.stride, c.pool))]
  if (
    min(whole) < 1
    or not all(1 <= b <= 8 for b in (plan.bits, *(c.bits for c in plan.convs)))
    or head_bits not in (2, 8)
  ):
    raise EdgeError('a size or a number of bits in its head cannot be')
  if not np.isfinite(scale) or scale <= 0:
    raise EdgeError(f'the scale of its logits is {scale}')


def _read(source: Reader, shape: tuple[int, ...], block: tuple, weight_bits: int) -> Numbers:
  code, nonzero, multiplier_bits, least, shift_bits, offset_bits = block
  size, outputs, nonzero = math.prod(shape), shape[-1], int.from_bytes(nonzero, 'little')
  widths = (multiplier_bits <= 8, least <= 31, shift_bits <= 5, 1 <= offset_bits <= 24, code <= MOST_CODE)
  if nonzero > size or not all(widths):
    raise EdgeError('a size in the block of a layer cannot be')
  if weight_bits == 2:
    flat = read_ternary(source, size, nonzero, code)
  else:
    flat = source.numbers(size, 8).astype(np.uint8).view(np.int8).astype(np.int64)
  multiplier = source.numbers(outputs, multiplier_bits)
  shift = source.numbers(outputs, shift_bits) + least
  offset = source.numbers(outputs, offset_bits)
  offset = np.where(offset >> (offset_bits - 1), offset - (1 << offset_bits), offset)
  if (shift > 31).any():
    raise EdgeError('a shift of more than 31 bits')
  return Numbers(flat.reshape(shape).astype(np.int8), multiplier, offset, shift)


def save(network: Network, path: str | Path) -> int:
  """Writes a network's file, whole or not at all, and returns its size in bytes.

  Raises:
    EdgeError: the network does not fit the format.
  """
  data = packed(network)
  files.write(Path(path), data)
  return len(data)


def load(path: str | Path) -> Network:
  """Reads a packed network.

  Raises:
    EdgeError: there is no such file, or it is not a packed network.
  """
  try:
    data = files.read(path, MOST_FILE)
    return unpacked(data)
  except OSError as error:
    raise EdgeError(f'{path}: {error.strerror}') from error
  except ValueError as error:
    raise EdgeError(f'{path} is no packed network: {error}') from error
