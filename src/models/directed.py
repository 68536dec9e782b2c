"""A network of clips that a node of a graph directs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .graphs import Graph, GraphEncoder
from .layers import accurate, constrain, dense, named


class DirectedVideo(nn.Module):
  """Logits of clips, after a node each: its features, of an R-GCN, scale and shift the channels of every layer (FiLM, Perez
  et al. 2018, arXiv:1709.07871, eq. 1).

  Attributes:
    widths: channels after each convolution over time and space; the first halves all three by windows of 4, and so does
      each after the second by windows of 3.
    width, layers: of the graph's encoder.
  """

  graph: Graph
  classes: int
  widths: Sequence[int]
  width: int
  layers: int = 2
  groups: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b t h w c'], query: Int[Array, ' b'] | None = None, train: bool = False
  ) -> Float[Array, 'b classes']:
    del train
    query = jnp.zeros(len(x), jnp.int32) if query is None else query
    node = GraphEncoder(self.graph, self.width, self.layers, dtype=self.dtype, name='encoder')()[query]
    x = x.astype(self.dtype)
    for i, features in enumerate(self.widths):
      rows, columns = ('in', 'mid') if i % 2 == 0 else ('mid', 'in')
      kernel = named(nn.initializers.he_normal(), *(None,) * 3, rows, columns)
      bias = named(nn.initializers.zeros_init(), columns)
      window, strides = ((4,) * 3, (2,) * 3) if i == 0 else ((3,) * 3, (1 if i == 1 else 2,) * 3)
      own = {'kernel_init': kernel, 'bias_init': bias, 'dtype': self.dtype}
      x = nn.Conv(features, window, strides, name=f'conv_{i}', **own)(x)
      x = nn.GroupNorm(self.groups, dtype=self.dtype, name=f'norm_{i}')(x)
      film = dense(2 * features, (None, columns), nn.initializers.lecun_normal(), dtype=self.dtype, name=f'film_{i}')
      scale, shift = jnp.split(film(node)[:, None, None, None], 2, -1)
      x = nn.gelu(x * (1 + scale) + shift)
      x = constrain(x, 'batch', None, None, None, columns)
    x = x.mean((1, 2, 3))
    rows = 'mid' if len(self.widths) % 2 else 'in'
    return accurate(
      dense(self.classes, (rows, 'classes'), nn.initializers.lecun_normal(), dtype=self.dtype, name='logits')(x)
    )
