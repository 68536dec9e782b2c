"""The pre-norm block of transformers (Radford et al. 2019), causal or not, with its attention and norms."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from .layers import accurate, constrain, dense, named


class AttentionBlock(nn.Module):
  """A transformer block: attention and a multi-layer perceptron four times as wide, each added to its input."""

  width: int
  heads: int
  dtype: Any
  causal: bool

  @nn.compact
  def __call__(self, x: Float[Array, 'b t d']) -> Float[Array, 'b t d']:
    init = nn.initializers.lecun_normal()
    y = layer_norm(self.dtype, 'norm_attention')(x)
    qkv = dense(3 * self.width, ('width', 'hidden'), init, dtype=self.dtype, name='qkv')(y)
    qkv = constrain(qkv, 'batch', None, 'hidden')
    q, k, v = rearrange(qkv, 'b t (h three d) -> three b t h d', three=3, h=self.heads)
    mask = jnp.tri(x.shape[1], dtype=bool) if self.causal else None
    y = rearrange(attend(q, k, v, mask), 'b t h d -> b t (h d)')
    x = x + dense(self.width, ('hidden', 'width'), init, dtype=self.dtype, name='attended')(y)
    x = constrain(x, 'batch', None, None)
    return feed_forward(x, self.width, self.dtype)


def feed_forward(x: Float[Array, 'b *t d'], width: int, dtype: Any) -> Float[Array, 'b *t d']:
  """Applies a block's multi-layer perceptron, four times as wide, and adds the result to its input.

  The layers belong to the calling module.
  """
  init = nn.initializers.lecun_normal()
  y = layer_norm(dtype, 'norm_mlp')(x)
  y = nn.gelu(dense(4 * width, ('width', 'hidden'), init, dtype=dtype, name='mlp_in')(y))
  y = constrain(y, 'batch', *[None] * (x.ndim - 2), 'hidden')
  return x + dense(width, ('hidden', 'width'), init, dtype=dtype, name='mlp_out')(y)


@jax.jit  # `parallel.partition` knows it by its name and runs it differently where tokens lie on several devices
def attend(
  q: Float[Array, '*b q h d'],
  k: Float[Array, '*b k h d'],
  v: Float[Array, '*b k h e'],
  mask: Bool[Array, 'q k'] | None = None,
) -> Float[Array, '*b q h e']:
  """Computes softmax(q k^T / sqrt(d)) v for each head, over the keys that the mask lets a query see.

  `jax.nn.dot_product_attention` is not used: it takes the softmax in float32 even where all else is in float64.
  """
  logits = accurate(jnp.einsum('...qhd,...khd->...hqk', q, k)) / q.shape[-1] ** 0.5
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
  return jnp.einsum('...hqk,...khd->...qhd', jax.nn.softmax(logits).astype(v.dtype), v)


def layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    dtype=dtype,
    scale_init=named(nn.initializers.ones_init(), 'width'),
    bias_init=named(nn.initializers.zeros_init(), 'width'),
    name=name,
  )
