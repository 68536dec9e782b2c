"""Packed files: their size, and files that are cut off, damaged, foreign or made to do harm."""

import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh.edge import Conv, EdgeError, pack
from kronmesh.edge.bits import PLAIN, Reader, Writer, best_code, read_ternary, write_ternary
from tests.edge import networks

DATA = pack.packed(networks.random_network(networks.CONVS['residual pooled']))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-1, 1), max_size=400), st.integers(0, 9))
def test_every_code_gives_the_weights_back(weights, code):
  flat, out = np.asarray(weights, np.int64), Writer()
  write_ternary(out, flat, code)
  source = Reader(out.data())
  np.testing.assert_array_equal(read_ternary(source, len(flat), np.count_nonzero(flat), code), flat)
  source.check_end()


@pytest.mark.parametrize('zeros', [0.5, 0.8, 0.9, 0.95, 0.99])
def test_weights_take_little_more_than_their_entropy(zeros):
  rng, size = np.random.default_rng(0), 100_000
  flat, out = np.sign(rng.standard_normal(size)).astype(int) * (rng.random(size) > zeros), Writer()
  write_ternary(out, flat, best_code(flat))
  p = 1 - zeros
  entropy = size * (-zeros * np.log2(zeros) - p * np.log2(p / 2))
  assert 8 * len(out.data()) < 1.04 * entropy


def test_dense_weights_take_five_to_a_byte():
  flat = np.random.default_rng(0).integers(-1, 2, 1000)
  assert best_code(flat) == PLAIN


def test_a_file_is_read_back(tmp_path):
  network = networks.random_network(networks.CONVS['bits'])
  assert pack.save(network, tmp_path / 'net.kmt') == os.path.getsize(tmp_path / 'net.kmt')
  again = pack.load(tmp_path / 'net.kmt')
  assert again.plan == network.plan and again.shape == network.shape
  for old, new in zip([*network.layers, network.head[:2]], [*again.layers, again.head[:2]], strict=True):
    for a, b in zip(old, new, strict=True):
      np.testing.assert_array_equal(a, b)
  assert again.head.scale == np.float32(network.head.scale)


def test_a_file_that_is_cut_off_or_damaged_is_refused():
  for end in range(len(DATA)):
    with pytest.raises(EdgeError):
      pack.unpacked(DATA[:end])
  for i in range(len(DATA)):
    with pytest.raises(EdgeError):
      pack.unpacked(DATA[:i] + bytes([DATA[i] ^ 16]) + DATA[i + 1 :])
  with pytest.raises(EdgeError):
    pack.unpacked(DATA + b'0')


def signed(data: bytes) -> bytes:
  return data + struct.pack('<I', zlib.crc32(data))


@settings(deadline=None, max_examples=400)
@given(st.integers(4, len(DATA) - 5), st.integers(0, 255), st.integers(0, 40))
def test_a_forged_file_is_refused_or_is_a_network(place, value, cut):
  body = DATA[:-4]
  body = body[:place] + bytes([value]) + body[place + 1 : len(body) - cut if cut else None]
  start = time.monotonic()
  try:
    network = pack.unpacked(signed(body))
  except EdgeError as error:
    assert '\n' not in str(error)
  else:
    pack.packed(network)
  assert time.monotonic() - start < 2


def test_a_head_that_claims_much_takes_no_memory():
  body = bytearray(DATA[:-4])
  body[4 + 7 : 4 + 8] = b'\x02'  # two layers, each of 65,535 channels
  for i in range(2):
    at = 4 + pack._START.size + i * (pack._LAYER.size + pack._BLOCK.size)
    body[at : at + pack._LAYER.size] = pack._LAYER.pack(65535, 15, 1, 1, 0, 0, 4)
  tracemalloc.start()
  with pytest.raises(EdgeError, match='weights, more than'):
    pack.unpacked(signed(bytes(body)))
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()


def test_files_that_are_none(tmp_path):
  (tmp_path / 'text').write_text('KMT')
  for path, words in (('text', 'does not begin'), ('none', 'No such file'), ('.', 'Is a directory')):
    with pytest.raises(EdgeError, match=words) as caught:
      pack.load(tmp_path / path)
    assert str(tmp_path) in str(caught.value)
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(EdgeError, match='not a regular file'):
    pack.load(tmp_path / 'pipe')


def test_a_network_outside_of_the_format_is_refused():
  with pytest.raises(EdgeError, match='does not fit the format'):
    pack.packed(networks.random_network((Conv(3),), outputs=70_000, shape=(3, 3, 1)))
