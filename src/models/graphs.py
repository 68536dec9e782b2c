"""Knowledge graphs as inputs: message passing along typed links, link prediction, and classes that are nodes.

A graph comes in parts, one for each shard of the batch (`data.partitioned`), and is sharded over the batch's axes. Only
features of nodes that other parts read are gathered; all else stays on its shard. One part is the whole graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..program import used
from .convnet import ConvNet
from .layers import accurate, constrain, dense, named

DECODERS = ('distmult', 'complex')
"""Lists the decoders of `LinkPredictor`: DistMult (Yang et al. 2015) and ComplEx (Trouillon et al. 2016)."""


class Graph(NamedTuple):
  """Holds a graph in parts, as a model takes it: the fields of `data.Parts`, and the number of relations.

  There are p parts, one for each shard of the batch, with n places each for nodes.

  Attributes:
    nodes: the node at each place of a part, -1 where there is none.
    part: the part of each node.
    place: the place of each node in its part.
    shared: the places of a part's nodes that other parts read, filled up with place 0.
    source: the source of each link: a place in the link's part or, from n on, one among all shared places, part after
      part.
    target: the target of each link, a place in its part.
    relation: the relation of each link.
    count: the number of links of that relation that the target has; 0 where there is no link.
    relations: the number of relations, the kinds of links.
  """

  nodes: Int[np.ndarray, 'p n']
  part: Int[np.ndarray, ' nodes']
  place: Int[np.ndarray, ' nodes']
  shared: Int[np.ndarray, 'p k']
  source: Int[np.ndarray, 'p links']
  target: Int[np.ndarray, 'p links']
  relation: Int[np.ndarray, 'p links']
  count: Int[np.ndarray, 'p links']
  relations: int

  @property
  def size(self) -> int:
    """The number of nodes."""
    return len(self.part)


def neighbours(x: Float[Array, 'p n d'], graph: Graph) -> Float[Array, 'p n r d']:
  """Returns the mean of each node's neighbours' features for each relation.

  These are the sums of R-GCN's eq. 2 before its matrices are applied.
  """
  shared = jnp.take_along_axis(x, graph.shared[..., None], 1).reshape(-1, x.shape[-1])
  shared = constrain(shared, None, None)  # every part reads it
  n, r = x.shape[1], graph.relations

  def one(x, source, target, relation, count):
    share = jnp.where(count > 0, 1 / jnp.maximum(count, 1).astype(x.dtype), 0)
    sent = jnp.concatenate([x, shared])[source] * share[:, None]
    return jax.ops.segment_sum(sent, target * r + relation, n * r)

  sums = jax.vmap(one)(x, graph.source, graph.target, graph.relation, graph.count)
  return constrain(sums, 'batch', None, None).reshape(*x.shape[:2], r, -1)


class GraphEncoder(nn.Module):
  """An encoder of all nodes: embeddings, then layers of an R-GCN (Schlichtkrull et al. 2018, eq. 2 and 3).

  It returns their features, (nodes, width).

  Attributes:
    graph: the graph in parts.
    width: width of embeddings and layers.
    layers: number of layers; 0 for embeddings alone.
    bases: number of bases of the relations' matrices (eq. 3); 0 gives each relation its own matrix.
  """

  graph: Graph
  width: int
  layers: int
  bases: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self) -> Float[Array, 'nodes d']:
    init = named(nn.initializers.normal(0.1), 'nodes', 'width')
    table = nn.Embed(self.graph.size, self.width, embedding_init=init, dtype=self.dtype, name='entities')
    arrays = [k for k in Graph._fields if k != 'relations']
    held = {k: self.variable('graph', k, jnp.asarray, getattr(self.graph, k)).value for k in arrays}
    graph = self.graph._replace(**held)
    there = (graph.nodes >= 0)[..., None]
    outside = jnp.where(graph.nodes < 0, self.graph.size, graph.nodes)  # a place without a node looks up no row
    x = constrain(jnp.where(there, table(outside), 0), 'batch', None, None)
    for i in range(self.layers):
      x = self.layer(x, graph, there, i)
    # Puts features in the order of the nodes, so that callers can index them by node.
    return x.reshape(-1, self.width)[graph.part * x.shape[1] + graph.place]

  def layer(
    self, x: Float[Array, 'p n d'], graph: Graph, there: Bool[Array, 'p n 1'], number: int
  ) -> Float[Array, 'p n d']:
    init = nn.initializers.lecun_normal()
    sums = neighbours(x, graph)
    if self.bases:
      kernel = named(init, None, None)
      sums = used(jnp.swapaxes(sums, -1, -2), there[..., None])
      mix = nn.Dense(self.bases, use_bias=False, kernel_init=kernel, dtype=self.dtype, name=f'bases_{number}')
      sums = mix(sums)
    sums = used(sums.reshape(*x.shape[:2], -1), there)
    related = dense(self.width, ('in', 'width'), init, use_bias=False, dtype=self.dtype, name=f'related_{number}')
    from_itself = dense(self.width, ('in', 'width'), init, dtype=self.dtype, name=f'own_{number}')
    y = related(sums) + from_itself(used(x, there))
    last = number == self.layers - 1
    return constrain(jnp.where(there, y if last else nn.relu(y), 0), 'batch', None, None)


class LinkPredictor(nn.Module):
  """Maps queries for the missing end of links, (node, relation), to logits over all nodes.

  The decoder is DistMult (Yang et al. 2015) or ComplEx (Trouillon et al. 2016), on embeddings or on the output of an
  R-GCN (Schlichtkrull et al. 2018). Relations count both directions.

  `apply(variables, x, train=False)` takes x, (b, 2): a node and a relation for each query. It returns logits,
  (b, nodes), in at least float32. `train` changes nothing.

  Attributes:
    graph: the links that messages travel along: training links only.
    width: the width of features, in real numbers; ComplEx pairs them as complex ones.
    relations: the number of relations that a query may name.
    decoder: one of `DECODERS`.
    layers: the number of layers of the R-GCN; 0 for embeddings alone.
    bases: the number of bases of the relations' matrices in the R-GCN; 0 gives each relation its own matrix.
    dtype: the type of the computation; parameters are float32.

  Raises:
    ValueError: the decoder is unknown, or ComplEx is given an odd width.
  """

  graph: Graph
  width: int
  relations: int
  decoder: str = 'complex'
  layers: int = 0
  bases: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Int[Array, 'b 2'], train: bool = False) -> Float[Array, 'b nodes']:
    del train
    if self.decoder not in DECODERS:
      raise ValueError(f'decoder={self.decoder!r} is unknown; choose from {", ".join(DECODERS)}')
    if self.decoder == 'complex' and self.width % 2:
      raise ValueError(f'width={self.width} of complex features must be even')
    nodes = GraphEncoder(self.graph, self.width, self.layers, self.bases, self.dtype, name='encoder')()
    init = named(nn.initializers.normal(0.1), None, 'width')
    relation = nn.Embed(self.relations, self.width, embedding_init=init, dtype=self.dtype, name='relations')(x[:, 1])
    query = DECODE[self.decoder](nodes[x[:, 0]], relation)
    return accurate(constrain(query, 'batch', None) @ nodes.T)


def _complex(e: Float[Array, 'b d'], r: Float[Array, 'b d']) -> Float[Array, 'b d']:
  """Returns the vector whose product with o is Re<e, r, conj(o)>: real parts, then imaginary ones."""
  (er, ei), (rr, ri) = jnp.split(e, 2, -1), jnp.split(r, 2, -1)
  return jnp.concatenate([er * rr - ei * ri, er * ri + ei * rr], -1)


DECODE = {'distmult': jnp.multiply, 'complex': _complex}


class ZeroShot(nn.Module):
  """Maps images to logits of classes that are nodes of a graph (Wang et al. 2018, arXiv:1803.08035).

  A logit is the product of an image's features with those of a node, scaled to unit length. A class without images has
  features too.

  `apply(variables, x, train=False)` takes images x, (b, h, w, c), and returns logits, (b, classes), in at least
  float32. `train` changes nothing.

  Attributes:
    graph: the graph in parts.
    nodes: the node of each class.
    widths: the channels of the convolutional network, see `ConvNet`.
    width: the width of features.
    layers: the number of layers of the R-GCN; 0 for embeddings alone.
    dtype: the type of the computation; parameters are float32.
  """

  graph: Graph
  nodes: Sequence[int]
  widths: Sequence[int]
  width: int
  layers: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], train: bool = False) -> Float[Array, 'b classes']:
    classes = GraphEncoder(self.graph, self.width, self.layers, dtype=self.dtype, name='encoder')()
    features = ConvNet(self.widths, self.width, dtype=self.dtype, name='images')(x, train)
    # Class features get unit length. Else classes without images would never win, as nothing lengthens their features.
    unit = lambda v: v / (jnp.linalg.norm(v, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    return accurate(features @ unit(classes[jnp.asarray(self.nodes)]).T)
