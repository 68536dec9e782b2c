"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from .layers import accurate, constrain, dense


class MLP(nn.Module):
  """A perceptron from inputs of any shape to logits. Layers are split by columns and by rows in turn."""

  hidden: Sequence[int]
  classes: int
  activation: str = 'tanh'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b ...'], train: bool = False) -> Float[Array, 'b classes']:
    del train
    x = rearrange(x, 'b ... -> b (...)').astype(self.dtype)
    init = nn.initializers.lecun_normal()
    for i, width in enumerate(self.hidden):
      names = ('in', 'hidden') if i % 2 == 0 else ('hidden', 'in')
      x = getattr(nn, self.activation)(dense(width, names, init, dtype=self.dtype, name=f'hidden_{i}')(x))
      x = constrain(x, 'batch', names[-1])
    names = ('hidden', 'out') if len(self.hidden) % 2 else ('in', 'out')
    return accurate(dense(self.classes, names, init, dtype=self.dtype, name='logits')(x))
