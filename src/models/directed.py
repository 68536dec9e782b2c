"""A network for clips whose attention a node of a graph directs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from .attention import attend
from .graphs import Graph, GraphEncoder
from .layers import accurate, constrain, dense, named


class DirectedVideo(nn.Module):
  """Maps clips, each directed by a node of a graph, to logits.

  A convolutional network gives features at every place of a clip. They are averaged over places, weighted by how well
  they fit the node's features, which an R-GCN computes. The weights are one head of attention (Vaswani et al. 2017,
  arXiv:1706.03762, eq. 1) whose only query is the node. Node features are first scaled to unit size, because an
  encoder's are a tenth of that when training starts.

  `apply(variables, x, query, train=False)` takes clips x, (b, t, h, w, c), and the number of each clip's node, `query`,
  (b,). None stands for node 0 in every clip. It returns logits, (b, classes), in at least float32. `train` changes
  nothing.

  Attributes:
    graph: the graph in parts.
    classes: the number of logits.
    widths: channels after each convolution over time and space. The first has windows of 4, the others of 3; all but
      the second halve time and space.
    width: the width of the graph's embeddings and layers, and of keys and queries.
    layers: the number of layers of the R-GCN; 0 for embeddings alone.
    groups: the number of groups in each norm, which divides every one of `widths`.
    dtype: the type of the computation; parameters are float32.
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
    x = x.astype(self.dtype)
    for i, features in enumerate(self.widths):
      rows, columns = ('in', 'mid') if i % 2 == 0 else ('mid', 'in')
      kernel = named(nn.initializers.he_normal(), *(None,) * 3, rows, columns)
      bias = named(nn.initializers.zeros_init(), columns)
      window, strides = ((4,) * 3, (2,) * 3) if i == 0 else ((3,) * 3, (1 if i == 1 else 2,) * 3)
      settings = {'kernel_init': kernel, 'bias_init': bias, 'dtype': self.dtype}
      x = nn.Conv(features, window, strides, name=f'conv_{i}', **settings)(x)
      x = nn.GroupNorm(self.groups, dtype=self.dtype, name=f'norm_{i}')(x)
      x = constrain(nn.gelu(x), 'batch', None, None, None, columns)
    x = rearrange(x, 'b t h w c -> b (t h w) c')
    node = GraphEncoder(self.graph, self.width, self.layers, dtype=self.dtype, name='encoder')()[query]
    node = nn.RMSNorm(use_scale=False, dtype=self.dtype)(node)
    settings, rows = (
      {'init': nn.initializers.lecun_normal(), 'dtype': self.dtype},
      'mid' if len(self.widths) % 2 else 'in',
    )
    asked = dense(self.width, (None, 'width'), name='asked', **settings)(node)
    keys = dense(self.width, (rows, 'width'), name='keys', **settings)(x)
    x = attend(asked[:, None, None], keys[:, :, None], x[:, :, None])[:, 0, 0]
    return accurate(dense(self.classes, (rows, 'classes'), name='logits', **settings)(x))
