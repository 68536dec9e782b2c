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
  """Maps inputs of any shape to logits by a multi-layer perceptron.

  `apply(variables, x, train=False)` takes x of shape (b, ...), flattens each example, and returns logits, (b, classes),
  in at least float32. `train` changes nothing. Layers are split by columns and by rows in turn.

  Attributes:
    hidden: the widths of the hidden layers.
    classes: the number of logits.
    activation: the name of a function of flax.linen, such as 'tanh' or 'gelu'.
    dtype: the type of the computation; parameters are float32.
  """

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
