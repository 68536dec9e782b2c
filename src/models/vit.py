"""A vision transformer (Dosovitskiy et al. 2020) over any number of spatial axes; it classifies the mean of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from .attention import AttentionBlock, layer_norm
from .layers import accurate, blocks, dense, named, remat


class ViT(nn.Module):
  """Maps images, clips or volumes to logits by a vision transformer (Dosovitskiy et al. 2020); ViT-B/16 by default.

  It classifies the mean of the tokens.

  `apply(variables, x, train=False)` takes x of shape (b, *space, c), with as many axes of space as `patch` has numbers,
  and returns logits, (b, classes), in at least float32. `train` changes nothing.

  Attributes:
    classes: the number of logits.
    patch: the sides of a patch along the axes of space, which they divide.
    layers: the number of blocks.
    width: the width of the residual stream, which the heads divide.
    heads: the number of heads of attention.
    stacked: whether one block runs in a loop over layers, with parameters that lead with an axis of layers. It compiles
      faster, and a mesh can keep some layers on each device along `pipe`.
    dtype: the type of the computation; parameters are float32.
    keep: the activations that are kept for the backward pass, while the others are computed again: 'all', 'blocks' (the
      inputs of blocks), 'products' (the results of matrix products too) or 'weights' (only of products with weights).

  Raises:
    ValueError: the patch does not divide the inputs, or `keep` is unknown.
  """

  classes: int
  patch: Sequence[int] = (16, 16)
  layers: int = 12
  width: int = 768
  heads: int = 12
  stacked: bool = False
  dtype: Any = jnp.float32
  keep: str = 'all'

  @nn.compact
  def __call__(self, x: Float[Array, 'b *space c'], train: bool = False) -> Float[Array, 'b classes']:
    del train
    space, patch = x.shape[1:-1], tuple(self.patch)
    if len(space) != len(patch) or any(s % p for s, p in zip(space, patch, strict=True)):
      raise ValueError(f'patch={patch} does not divide inputs of {space}; change one')
    init = nn.initializers.normal(0.02)
    kernel = named(nn.initializers.lecun_normal(), *('window',) * len(patch), None, 'width')
    bias = named(nn.initializers.zeros_init(), 'width')
    x = nn.Conv(
      self.width, patch, patch, kernel_init=kernel, bias_init=bias, dtype=self.dtype, name='patches'
    )(x.astype(self.dtype))  # fmt: skip
    x = x.reshape(x.shape[0], -1, self.width)
    x = x + self.param('positions', named(init, None, 'width'), x.shape[1:]).astype(self.dtype)
    block = functools.partial(remat(AttentionBlock, self.keep), self.width, self.heads, self.dtype, causal=False)
    x = blocks(block, x, self.layers, self.stacked)
    x = layer_norm(self.dtype, 'norm')(x).mean(1)
    init = nn.initializers.lecun_normal()
    return accurate(dense(self.classes, ('width', None), init, dtype=self.dtype, name='logits')(x))
