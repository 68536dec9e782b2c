"""Random networks of integers, and trained-looking float networks, for the tests of `edge`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kronmesh import models
from kronmesh.edge import Conv, Head, Network, Numbers, Plan
from kronmesh.edge.layers import check, shapes

# Every kind of layer: strided, pooled, 1 x 1, depthwise, residual, wide windows, other bits.
CONVS = {
  'plain': (Conv(4), Conv(5)),
  'pooled': (Conv(4, pool=2), Conv(5)),
  'strided': (Conv(4, stride=2), Conv(3, stride=2, kernel=5)),
  'pointwise': (Conv(6, kernel=1), Conv(4)),
  'depthwise': (Conv(4), Conv(4, depthwise=True), Conv(3, kernel=1)),
  'residual': (Conv(4), Conv(4), Conv(4, add=1)),
  'residual pooled': (Conv(3), Conv(3, kernel=1, add=1, pool=2), Conv(2)),
  'bits': (Conv(4, bits=2), Conv(3, bits=1), Conv(3, bits=5)),
}


def random_network(
  convs: tuple[Conv, ...], shape=(7, 6, 2), zeros=0.6, bits=4, by_place=False, outputs=3, seed=0
) -> Network:
  """Returns a network with random weights and requantisations that spread over the levels."""
  rng = np.random.default_rng(seed)
  plan = Plan(convs, outputs, bits, by_place)
  layers, before = [], bits
  for conv, (_, _, channels) in zip(convs, shapes(plan, shape), strict=False):
    inputs = 1 if conv.depthwise else channels
    weights = np.sign(rng.standard_normal((conv.kernel, conv.kernel, inputs, conv.width)))
    weights = (weights * (rng.random(weights.shape) > zeros)).astype(np.int8)
    spread = np.sqrt(np.abs(weights).sum((0, 1, 2)) + 1) * 2**before
    rate = 2 ** rng.uniform(-1, 1, conv.width) * 2**conv.bits / spread
    shift = np.floor(np.log2(255 / rate)).clip(0, 20).astype(int)
    multiplier = np.minimum(np.round(rate * 2.0**shift), 255).astype(int)
    offset = np.clip(np.round(rng.normal(0.3, 0.3, conv.width) * 2**conv.bits * 2.0**shift), -(2**15), 2**15 - 1)
    layers.append(Numbers(weights, multiplier, offset.astype(int), shift))
    before = conv.bits
  weights = rng.integers(-1, 2, (convs[-1].width, outputs)).astype(np.int8)
  head = Head(weights, rng.integers(-50, 50, outputs), 0.01)
  return check(Network(plan, shape, tuple(layers), head))


def levels(network: Network, count: int, seed: int = 1) -> np.ndarray:
  """Returns random images of levels; some are all zeros or all at the top."""
  x = np.random.default_rng(seed).integers(0, 2**network.plan.bits, (count, *network.shape)).astype(np.uint8)
  x[:1], x[1:2] = 0, 2**network.plan.bits - 1
  return x


def float_network(seed: int = 0, shape=(8, 8, 1), **settings):
  """Returns a TernaryNet and variables whose norms have statistics that are not those of the beginning."""
  net = models.TernaryNet(**({'widths': (6, 8), 'classes': 4, 'pools': (1, 2), 'zeros': 0.6} | settings))
  keys = jax.random.split(jax.random.key(seed), 3)
  variables = net.init(keys[0], jnp.zeros((1, *shape)))
  variables = nn.meta.unbox(variables)
  for _ in range(5):
    x = jax.random.uniform(keys[1], (16, *shape))
    _, new = net.apply(variables, x, train=True, mutable=['batch_stats', 'edge'])
    variables = {**variables, **new}
  leaves, tree = jax.tree.flatten(variables['params'])
  noise = jax.random.split(keys[2], len(leaves))
  leaves = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, noise, strict=True)]
  return net, {**variables, 'params': jax.tree.unflatten(tree, leaves)}
