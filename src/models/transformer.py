"""A decoder-only transformer (pre-norm: Radford et al. 2019) of any size by its arguments."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from .layers import accurate, constrain, dense, named


class Transformer(nn.Module):
  """Logits of the next token at every position.

  Attributes:
    vocabulary: how many tokens there are.
    length: the longest sequence.
    width: of the residual stream; the heads divide it.
  """

  vocabulary: int
  length: int
  layers: int = 2
  width: int = 64
  heads: int = 4
  dtype: Any = jnp.float32

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
    for i in range(self.layers):
      x = _Block(self.width, self.heads, self.dtype, name=f'block_{i}')(x)
    x = _norm(self.dtype, 'norm')(x)
    return accurate(dense(self.vocabulary, ('width', None), init, use_bias=False, dtype=self.dtype, name='logits')(x))


class _Block(nn.Module):
  width: int
  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'b t d']) -> Float[Array, 'b t d']:
    init = nn.initializers.lecun_normal()
    y = _norm(self.dtype, 'norm_attention')(x)
    qkv = dense(3 * self.width, ('width', 'hidden'), init, dtype=self.dtype, name='qkv')(y)
    qkv = constrain(qkv, 'batch', None, 'hidden')
    q, k, v = rearrange(qkv, 'b t (h three d) -> three b t h d', three=3, h=self.heads)
    y = rearrange(_attention(q, k, v), 'b t h d -> b t (h d)')
    x = x + dense(self.width, ('hidden', 'width'), init, dtype=self.dtype, name='attended')(y)
    x = constrain(x, 'batch', None, None)
    y = _norm(self.dtype, 'norm_mlp')(x)
    y = nn.gelu(dense(4 * self.width, ('width', 'hidden'), init, dtype=self.dtype, name='mlp_in')(y))
    y = constrain(y, 'batch', None, 'hidden')
    return x + dense(self.width, ('hidden', 'width'), init, dtype=self.dtype, name='mlp_out')(y)


def _attention(
  q: Float[Array, 'b t h d'], k: Float[Array, 'b t h d'], v: Float[Array, 'b t h d']
) -> Float[Array, 'b t h d']:
  """Causal. Not `jax.nn.dot_product_attention`, whose softmax is in float32 even where all else is in float64."""
  logits = accurate(jnp.einsum('bqhd,bkhd->bhqk', q, k)) / q.shape[-1] ** 0.5
  causal = jnp.tri(q.shape[1], dtype=bool)
  weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
  return jnp.einsum('bhqk,bkhd->bqhd', weights.astype(v.dtype), v)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    dtype=dtype,
    scale_init=named(nn.initializers.ones_init(), 'width'),
    bias_init=named(nn.initializers.zeros_init(), 'width'),
    name=name,
  )
