"""The trained program, the reference, the packed file and the compiled program agree in every bit."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh import edge, models
from kronmesh.edge import pack, program, reference
from kronmesh.edge.activations import rounded
from tests.edge import networks


@pytest.mark.parametrize('by_place', [False, True])
@pytest.mark.parametrize('name', networks.CONVS)
def test_all_forms_of_a_network_agree(name, by_place):
  network = networks.random_network(networks.CONVS[name], by_place=by_place)
  levels = networks.levels(network, 20)
  expected = edge.streams(network, levels)[-1]
  assert len(np.unique(expected)) > 5
  for form in (network, pack.unpacked(pack.packed(network))):
    run = jax.jit(lambda x, n=form: program.levels(n.plan, n.layers, n.head, x))
    np.testing.assert_array_equal(run(levels), expected)
    np.testing.assert_array_equal(edge.streams(form, levels)[-1], expected)


def test_streams_use_their_levels():
  """A test by equality says little of streams that are constant."""
  for name, convs in networks.CONVS.items():
    streams = edge.streams(network := networks.random_network(convs), networks.levels(network, 20))
    for bits, stream in zip(reference.stream_bits(network), streams, strict=False):
      assert len(np.unique(stream)) > 2**bits / 4, (name, bits)


def _by_definition(network, x):
  """Computes the sums of the head one number at a time."""
  streams = [x.astype(int)]
  for conv, n in zip(network.plan.convs, network.layers, strict=True):
    before, around = streams[-1], conv.kernel // 2
    height, width = (-(-s // conv.stride) for s in before.shape[:2])
    out = np.zeros((height, width, conv.width), int)
    for i, j, o in np.ndindex(out.shape):
      acc = 0
      for a, b in np.ndindex(conv.kernel, conv.kernel):
        r, c = i * conv.stride + a - around, j * conv.stride + b - around
        if 0 <= r < before.shape[0] and 0 <= c < before.shape[1]:
          for k in [0] if conv.depthwise else range(before.shape[2]):
            acc += int(n.weights[a, b, k, o]) * int(before[r, c, o if conv.depthwise else k])
      z, most = (int(n.multiplier[o]) * acc + int(n.offset[o])) >> int(n.shift[o]), 2**conv.bits - 1
      if conv.add is None:
        out[i, j, o] = min(max(z, 0), most)
      else:
        out[i, j, o] = min(max(min(max(z, -most - 1), most) + int(streams[conv.add][i, j, o]), 0), most)
    p = conv.pool
    out = out[: height // p * p, : width // p * p].reshape(height // p, p, width // p, p, -1).max((1, 3))
    streams.append(out)
  return streams[-1].sum((0, 1)) @ network.head.weights.astype(int) + network.head.offset


@pytest.mark.parametrize('name', networks.CONVS)
def test_the_reference_is_the_definition(name):
  network = networks.random_network(networks.CONVS[name], shape=(5, 4, 2), seed=3)
  levels = networks.levels(network, 4)
  expected = [_by_definition(network, x) for x in levels]
  np.testing.assert_array_equal(edge.streams(network, levels)[-1], expected)


FLOAT = {
  'share': {},
  'mean': {'rule': 'mean'},
  'learned': {'rule': 'learned'},
  'chosen': {'rule': 'chosen'},
  'fixed-point head': {'head_bits': 8},
  'every kind': {
    'widths': (6, 6, 6, 8),
    'kernels': (3, 3, 1, 5),
    'strides': (1, 1, 1, 2),
    'depthwise': (False, True, False, False),
    'adds': (None, None, 1, None),
    'pools': 1,
    'bits': (4, 4, 4, 3),
    'input_bits': 5,
  },
}


@pytest.mark.parametrize('name', FLOAT)
def test_the_evaluation_in_training_is_the_network(name):
  net, variables = networks.float_network(**FLOAT[name])
  network = models.ternary.network(net, variables, (8, 8, 1))
  pixels = np.random.default_rng(0).random((200, 8, 8, 1), np.float32)
  logits = jax.jit(net.apply)(variables, pixels)
  sums = edge.streams(network, reference.quantised(pixels, net.input_bits))[-1]
  np.testing.assert_array_equal(logits, reference.logits(network, sums))
  np.testing.assert_array_equal(jax.jit(lambda x: edge.forward(network, x))(pixels), sums)
  assert len(np.unique(logits)) > 20


def test_evaluation_is_close_to_the_training_program():
  """Folding rounds the norm's numbers alone: with the batch's own statistics, few levels differ, each by one."""
  net, variables = networks.float_network(widths=(6,), pools=1)
  pixels = jax.random.uniform(jax.random.key(0), (400, 8, 8, 1))
  trained, new = net.apply(variables, pixels, train=True, mutable=['batch_stats', 'edge'])
  moved = lambda old, after: (after - 0.9 * old) / 0.1  # noqa: E731
  stats = jax.tree.map(moved, variables['batch_stats'], new['batch_stats'])
  evaluated = net.apply({**variables, 'batch_stats': stats}, pixels)
  assert np.abs(np.asarray(trained - evaluated)).max() < 0.05 * np.abs(np.asarray(trained)).max()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.integers(1, 8))
def test_pixels_are_rounded_alike(pixels, bits):
  pixels = np.asarray(pixels, np.float32)
  expected = reference.quantised(pixels, bits)
  np.testing.assert_array_equal(jax.jit(program.quantised, static_argnums=1)(pixels, bits), expected)


@pytest.mark.parametrize('bits', range(1, 9))
def test_all_bytes_are_rounded_alike(bits):
  """Pixels that were bytes: all 256 values, and those beside the border of two levels."""
  pixels = np.arange(256, dtype=np.float32) / np.float32(255)
  borders = ((np.arange(2**bits) + 0.5) / (2**bits - 1)).astype(np.float32)
  pixels = np.concatenate([pixels, borders, np.nextafter(borders, np.float32(0)), np.nextafter(borders, np.float32(1))])
  pixels = pixels.clip(0, 1)
  expected = reference.quantised(pixels, bits)
  np.testing.assert_array_equal(jax.jit(program.quantised, static_argnums=1)(pixels, bits), expected)
  again = jax.jit(lambda x: program.quantised(rounded(x, bits), bits))(pixels)  # as TernaryNet reads its input
  np.testing.assert_array_equal(again, expected)
