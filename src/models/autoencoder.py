"""The deep autoencoder of Hinton and Salakhutdinov (2006), a task of Martens and Grosse (2015, section 13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from .layers import accurate, constrain, dense


class Autoencoder(nn.Module):
  """Maps images to logits of their pixels by a deep autoencoder (Hinton and Salakhutdinov 2006).

  Layers have `widths` down to the code and mirror them on the way back. All are followed by tanh, except the last one
  and those that are as wide as the code. The network for MNIST has widths=(1000, 500, 250, 30).

  `apply(variables, images, train=False)` takes images of any shape, (b, ...), flattens each one, and returns logits,
  (b, pixels), in at least float32. `train` changes nothing.

  Attributes:
    widths: the widths of the layers down to the code, which is the last.
    dtype: the type of the computation; parameters are float32.
  """

  widths: Sequence[int]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, ' b *image'], train: bool = False) -> Float[Array, 'b pixels']:
    del train
    x = rearrange(images, 'b ... -> b (...)').astype(self.dtype)
    pixels = x.shape[-1]
    layers = [*self.widths, *reversed(self.widths[:-1]), pixels]
    for i, width in enumerate(layers):
      out = 'pixels' if i == len(layers) - 1 else ('odd', 'even')[i % 2]
      names = ('even' if i % 2 == 0 else 'odd', out) if i else ('pixels', out)
      x = dense(width, names, nn.initializers.glorot_normal(), dtype=self.dtype, name=f'layer_{i}')(x)
      if i not in (len(self.widths) - 1, len(layers) - 1):  # the code and the pixels are linear
        x = nn.tanh(x)
      x = constrain(x, 'batch', out)
    return accurate(x)
