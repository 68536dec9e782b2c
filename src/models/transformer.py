"""A decoder-only transformer (pre-norm: Radford et al. 2019), whose arguments set its size."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .attention import AttentionBlock, layer_norm
from .layers import accurate, blocks, dense, named, remat


class Transformer(nn.Module):
  """Maps tokens to logits of the next token at every position, by a decoder-only transformer.

  Its blocks normalise before each layer (Radford et al. 2019).

  `apply(variables, tokens, train=False)` takes tokens, (b, t), and returns logits, (b, t, vocabulary), in at least
  float32. `train` changes nothing.

  Attributes:
    vocabulary: the number of different tokens.
    length: the length of the longest sequence.
    layers: the number of blocks.
    width: the width of the residual stream, which the heads divide.
    heads: the number of heads of attention.
    stacked: whether one block runs in a loop over layers, with parameters that lead with an axis of layers. It compiles
      faster, and a mesh can keep some layers on each device along `pipe`.
    dtype: the type of the computation; parameters are float32.
    keep: the activations that are kept for the backward pass, while the others are computed again: 'all', 'blocks' (the
      inputs of blocks), 'products' (the results of matrix products too) or 'weights' (only of products with weights).

  Raises:
    ValueError: a sequence is longer than `length`, or `keep` is unknown.
  """

  vocabulary: int
  length: int
  layers: int = 2
  width: int = 64
  heads: int = 4
  stacked: bool = False
  dtype: Any = jnp.float32
  keep: str = 'all'

  @nn.compact
  def __call__(self, tokens: Int[Array, 'b t'], train: bool = False) -> Float[Array, 'b t v']:
    del train
    t = tokens.shape[1]
    if t > self.length:
      raise ValueError(f'a sequence of {t} tokens is longer than length={self.length}; raise that')
    init = nn.initializers.normal(0.02)
    table = nn.Embed(self.vocabulary, self.width, embedding_init=named(init, None, 'width'), name='tokens')
    positions = self.param('positions', named(init, None, 'width'), (self.length, self.width))
    x = (table(tokens) + positions[:t]).astype(self.dtype)
    block = functools.partial(remat(AttentionBlock, self.keep), self.width, self.heads, self.dtype, causal=True)
    x = blocks(block, x, self.layers, self.stacked)
    x = layer_norm(self.dtype, 'norm')(x)
    return accurate(dense(self.vocabulary, ('width', None), init, use_bias=False, dtype=self.dtype, name='logits')(x))
