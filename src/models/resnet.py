"""Residual networks with batch normalisation (He et al. 2016, v1.5), for images and clips (Hara et al. 2018).

Their arguments make them anything from a toy to ResNet-50.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from .layers import accurate, constrain, dense, named, remat


class ResNet(nn.Module):
  """Maps images or clips to logits by a residual network with batch normalisation (He et al. 2016, v1.5).

  For clips it is that of Hara et al. 2018.

  `apply(variables, x, train=False)` takes images, (b, h, w, c), or clips, (b, t, h, w, c), and returns logits,
  (b, classes), in at least float32. With `train`, batch norms use the batch and update their running means; the
  collection 'batch_stats' must then be mutable.

  Attributes:
    blocks: residual blocks in each stage; (3, 4, 6, 3) is ResNet-50 with `bottleneck`.
    classes: the number of logits.
    width: channels of the first stage; each further stage doubles them and halves space (and time).
    bottleneck: whether a block is a 3x3 convolution between two of 1x1, the last of which has four times the channels;
      else it is two 3x3 convolutions.
    stem: 'imagenet' (7x7 by 2, then pooling by 2), 'small' (3x3) or 'patches' (4x4 by 4). Windows are as wide in time,
      but the first convolution keeps every frame.
    dtype: the type of the computation; parameters are float32.
    keep: the activations that are kept for the backward pass, while the others are computed again: 'all', 'blocks' (the
      inputs of blocks), 'products' (the results of matrix products too) or 'weights' (only of products with weights).

  Raises:
    ValueError: `keep` is unknown.
  """

  blocks: Sequence[int]
  classes: int
  width: int = 64
  bottleneck: bool = True
  stem: str = 'imagenet'
  dtype: Any = jnp.float32
  keep: str = 'all'

  @nn.compact
  def __call__(self, x: Float[Array, 'b *space c'], train: bool = False) -> Float[Array, 'b classes']:
    conv = functools.partial(_conv, self.dtype)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, param_dtype=jnp.float32
    )
    x = x.astype(self.dtype)
    space = x.ndim - 2
    every_frame = lambda stride: (1,) * (space - 2) + (stride,) * 2  # noqa: E731
    if self.stem == 'imagenet':
      x = conv(self.width, (7,) * space, strides=every_frame(2), padding=[(3, 3)] * space, name='stem')(x)
    elif self.stem == 'patches':
      x = conv(self.width, (4,) * space, strides=every_frame(4), name='stem')(x)
    elif self.stem == 'small':
      x = conv(self.width, (3,) * space, name='stem')(x)
    else:
      raise ValueError(f"stem {self.stem!r} is unknown; choose 'imagenet', 'small' or 'patches'")
    x = nn.relu(norm(name='stem_norm')(x))
    if self.stem == 'imagenet':
      x = nn.max_pool(x, (3,) * space, (2,) * space, padding=[(1, 1)] * space)
    for stage, count in enumerate(self.blocks):
      for block in range(count):
        strides = 2 if stage > 0 and block == 0 else 1
        residual = remat(_Block, self.keep)(
          self.width * 2**stage, strides, self.bottleneck, conv, norm, name=f'stage{stage}_block{block}'
        )
        x = residual(x)
    x = x.mean(axis=tuple(range(1, space + 1)))
    init = nn.initializers.lecun_normal()
    return accurate(dense(self.classes, ('in', 'classes'), init, dtype=self.dtype, name='logits')(x))


def _conv(
  dtype: Any, features: int, window: tuple[int, ...], axes: tuple[str, str] = ('in', 'out'), **kwargs
) -> nn.Conv:
  init = named(nn.initializers.he_normal(), *('window',) * len(window), *axes)
  return nn.Conv(features, window, use_bias=False, dtype=dtype, kernel_init=init, **kwargs)


class _Block(nn.Module):
  """A residual block. On a mesh with a `model` axis the last convolution is split by rows, the others by columns."""

  features: int
  strides: int
  bottleneck: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    out = self.features * (4 if self.bottleneck else 1)
    y, space = x, x.ndim - 2
    one, three, rest = (1,) * space, (3,) * space, (None,) * space
    if self.bottleneck:
      y = nn.relu(self.norm(name='norm_in')(self.conv(self.features, one, ('in', 'mid'), name='conv_in')(y)))
      y = constrain(y, 'batch', *rest, None)
    y = self.conv(self.features, three, ('in', 'mid'), strides=self.strides, name='conv_mid')(y)
    y = constrain(nn.relu(self.norm(name='norm_mid')(y)), 'batch', *rest, 'mid')
    window = one if self.bottleneck else three
    y = self.norm(name='norm_out')(self.conv(out, window, ('mid', 'out'), name='conv_out')(y))
    y = constrain(y, 'batch', *rest, None)
    if x.shape != y.shape:
      x = self.norm(name='norm_skip')(self.conv(out, one, strides=self.strides, name='conv_skip')(x))
    return nn.relu(x + y)
