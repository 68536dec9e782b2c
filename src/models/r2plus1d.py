"""R(2+1)D (Tran et al. 2018, arXiv:1711.11248), a residual network for clips.

Each convolution becomes one over space and one over time, with a norm and a nonlinearity between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from .layers import accurate, constrain, dense, named, remat


class R2Plus1D(nn.Module):
  """Maps clips to logits by an R(2+1)D network (Tran et al. 2018, arXiv:1711.11248); blocks=(2, 2, 2, 2) is R(2+1)D-18.

  Each convolution becomes one over space and one over time, with a norm and a nonlinearity between them.

  `apply(variables, x, train=False)` takes clips x, (b, t, h, w, c), and returns logits, (b, classes), in at least
  float32. With `train`, batch norms use the batch and update their running means; the collection 'batch_stats' must
  then be mutable.

  Attributes:
    blocks: residual blocks in each stage; each stage after the first doubles channels and halves time and space.
    classes: the number of logits.
    width: channels of the first stage.
    stem: 'large' (7x7 by 2, through 45 of 64 channels as in the paper), 'small' (3x3) or 'patches' (4x4 by 4).
    multiple: channels between space and time are rounded up to a multiple of this. With the size of a `model` axis they
      divide over that axis.
    dtype: the type of the computation; parameters are float32.
    keep: the activations that are kept for the backward pass, while the others are computed again: 'all', 'blocks' (the
      inputs of blocks), 'products' (the results of matrix products too) or 'weights' (only of products with weights).

  Raises:
    ValueError: `stem` or `keep` is unknown.
  """

  blocks: Sequence[int]
  classes: int
  width: int = 64
  stem: str = 'large'
  multiple: int = 1
  dtype: Any = jnp.float32
  keep: str = 'all'

  @nn.compact
  def __call__(self, x: Float[Array, 'b t h w c'], train: bool = False) -> Float[Array, 'b classes']:
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, param_dtype=jnp.float32
    )
    x = x.astype(self.dtype)
    stems = {'large': (7, 2, max(1, 45 * self.width // 64)), 'small': (3, 1, self.width), 'patches': (4, 4, self.width)}
    if self.stem not in stems:
      raise ValueError(f'stem={self.stem!r} is unknown; choose from {", ".join(stems)}')
    window, stride, mid = stems[self.stem]
    x = Separable(self.width, _up(mid, self.multiple), window, (1, stride), norm, self.dtype, name='stem')(x)
    x = nn.relu(norm(name='stem_norm')(x))
    for stage, count in enumerate(self.blocks):
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        residual = remat(_Block, self.keep)(
          self.width * 2**stage, stride, self.multiple, norm, self.dtype, name=f'stage{stage}_block{block}'
        )
        x = residual(x)
    x = x.mean((1, 2, 3))
    init = nn.initializers.lecun_normal()
    return accurate(dense(self.classes, ('in', 'classes'), init, dtype=self.dtype, name='logits')(x))


class Separable(nn.Module):
  """A convolution of 1 x `window` x `window` to `mid` channels, then one of 3 x 1 x 1.

  On a mesh with a `model` axis the first is split by columns, the second by rows.
  """

  features: int
  mid: int
  window: int
  strides: tuple[int, int]  # in time, in space
  norm: Any
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'b t h w c']) -> Float[Array, 'b t2 h2 w2 features']:
    time, space = self.strides
    x = _conv(self.dtype, self.mid, (1, self.window, self.window), (1, space, space), 'in', 'mid', name='space')(x)
    x = nn.relu(self.norm(name='norm')(x))
    x = constrain(x, 'batch', None, None, None, 'mid')
    x = _conv(self.dtype, self.features, (3, 1, 1), (time, 1, 1), 'mid', 'out', name='time')(x)
    return constrain(x, 'batch', None, None, None, None)


class _Block(nn.Module):
  features: int
  stride: int
  multiple: int
  norm: Any
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # The first has as many parameters as a 3 x 3 x 3 convolution (section 3.5); the second has the same `mid`.
    mid = (27 * x.shape[-1] * self.features) // (9 * x.shape[-1] + 3 * self.features)
    both = functools.partial(Separable, self.features, _up(mid, self.multiple), 3, norm=self.norm, dtype=self.dtype)
    y = both(strides=(self.stride, self.stride), name='first')(x)
    y = nn.relu(self.norm(name='norm_first')(y))
    y = self.norm(name='norm_second')(both(strides=(1, 1), name='second')(y))
    if x.shape != y.shape:
      skip = _conv(self.dtype, self.features, (1, 1, 1), (self.stride,) * 3, 'in', 'out', name='skip')
      x = self.norm(name='norm_skip')(skip(x))
    return nn.relu(x + y)


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _conv(dtype: Any, features: int, window: tuple, strides: tuple, *axes: str, name: str) -> nn.Conv:
  init = named(nn.initializers.he_normal(), None, None, None, *axes)
  padding = [(w // 2, w // 2) if w % 2 else (0, 0) for w in window]  # patches lie side by side
  return nn.Conv(features, window, strides, padding=padding, use_bias=False, dtype=dtype, kernel_init=init, name=name)
