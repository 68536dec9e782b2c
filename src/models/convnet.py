"""A plain convolutional network over any number of spatial axes, for images, clips or volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from .layers import accurate, constrain, dense, named


class ConvNet(nn.Module):
  """Maps images, clips or volumes to logits by a plain convolutional network.

  It has 3-wide convolutions, each halving space, group norms, a mean over space and a Dense layer.

  `apply(variables, x, train=False)` takes x of shape (b, *space, c), with any number of axes of space, and returns
  logits, (b, classes), in at least float32. `train` changes nothing.

  Attributes:
    widths: channels after each convolution; convolutions are split by columns and by rows in turn.
    classes: the number of logits.
    groups: the number of groups in each norm, which divides every width.
    dtype: the type of the computation; parameters are float32.
  """

  widths: Sequence[int]
  classes: int
  groups: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b *space c'], train: bool = False) -> Float[Array, 'b classes']:
    del train
    x = x.astype(self.dtype)
    space = x.ndim - 2
    init = nn.initializers.he_normal()
    for i, width in enumerate(self.widths):
      names = ('in', 'mid') if i % 2 == 0 else ('mid', 'in')
      kernel = named(init, *('window',) * space, *names)
      bias = named(nn.initializers.zeros_init(), names[-1])
      conv = nn.Conv(width, (3,) * space, 2, kernel_init=kernel, bias_init=bias, dtype=self.dtype, name=f'conv_{i}')
      x = nn.gelu(nn.GroupNorm(self.groups, dtype=self.dtype, name=f'norm_{i}')(conv(x)))
      x = constrain(x, 'batch', *(None,) * space, names[-1])
    x = x.mean(tuple(range(1, space + 1)))
    names = ('mid' if len(self.widths) % 2 else 'in', 'classes')
    init = nn.initializers.lecun_normal()
    return accurate(dense(self.classes, names, init, dtype=self.dtype, name='logits')(x))
