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
  """An autoencoder that returns logits of the pixels.

  Layers have `widths` down to the code and mirror them on the way back; all are tanh except a linear code. The paper's
  MNIST network is widths=(1000, 500, 250, 30).
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
      if width != self.widths[-1] and i < len(layers) - 1:
        x = nn.tanh(x)
      x = constrain(x, 'batch', out)
    return accurate(x)
