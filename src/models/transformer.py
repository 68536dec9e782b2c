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
  """A transformer from tokens to logits of the next token at every position.

  Attributes:
    vocabulary: number of different tokens.
    length: length of the longest sequence.
    width: width of the residual stream, which the heads divide.
    stacked: whether one block runs in a loop over layers; see `VideoTransformer`.
    keep: which activations are kept for the backward pass; see `layers.remat`.
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
