"""A transformer over clips whose attention is factorised over time and space, and its streaming form.

The factorisation is that of ViViT's model 3 (Arnab et al. 2021) and TimeSformer (Bertasius et al. 2021). With `causal`
no frame sees a later one, and with `window` each sees a limited number of frames. A model with both can read a stream
in pieces of any length, even frame by frame. Its memory does not grow, and the results are those of the whole clip.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .attention import attend, feed_forward, layer_norm
from .layers import accurate, blocks, constrain, dense, named, remat


class VideoTransformer(nn.Module):
  """Maps clips to logits of each clip, or of every frame, by a transformer.

  Attention is factorised over time and space, as in ViViT's model 3 (Arnab et al. 2021) and TimeSformer (Bertasius et
  al. 2021). A model with `causal` and `window` can read a stream in pieces of any length, even frame by frame. Its
  memory does not grow, and the results are those of the whole clip.

  `apply(variables, x, train=False, stream=False)` takes clips x, (b, t, h, w, c), and returns logits in at least
  float32: (b, classes), or (b, t, classes) with `each_frame`. With `stream`, x continues what earlier calls were given,
  from nothing at first; the collection 'stream' must then be mutable. `train` changes nothing.

  Attributes:
    classes: the number of logits.
    patch: height and width of a patch, which divide those of frames.
    depth: the number of frames that a patch spans, from its own frame back.
    layers: the number of blocks.
    width: the width of the residual stream, which the heads divide.
    heads: the number of heads of attention.
    window: the number of frames that attention over time reaches back, the frame itself counted; 0 for all.
    causal: whether a frame sees only itself and earlier ones.
    each_frame: whether to return logits of every frame instead of the clip's. The clip's come from the mean of all
      frames or, if causal, from the last.
    stacked: whether one block runs in a loop over layers, with parameters that lead with an axis of layers. It compiles
      faster, and a mesh can keep some layers on each device along `pipe`. It cannot read streams.
    dtype: the type of the computation; parameters are float32.
    keep: the activations that are kept for the backward pass, while the others are computed again: 'all', 'blocks' (the
      inputs of blocks), 'products' (the results of matrix products too) or 'weights' (only of products with weights).

  Raises:
    ValueError: a patch does not divide the frames, `keep` is unknown, or a stream is given to a model that cannot read
      one.
  """

  classes: int
  patch: Sequence[int] = (16, 16)
  depth: int = 2
  layers: int = 12
  width: int = 768
  heads: int = 12
  window: int = 0
  causal: bool = False
  each_frame: bool = False
  stacked: bool = False
  dtype: Any = jnp.float32
  keep: str = 'all'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b t h w c'], train: bool = False, stream: bool = False
  ) -> Float[Array, 'b classes'] | Float[Array, 'b t classes']:
    """Computes the logits; with `stream`, x continues what earlier calls were given, from nothing at first.

    A stream needs the collection 'stream' to be mutable.

    Raises:
      ValueError: a patch does not divide the frames, or the model needs all frames and cannot read a stream.
    """
    del train
    patch, space = tuple(self.patch), x.shape[2:4]
    if len(patch) != 2 or any(s % p for s, p in zip(space, patch, strict=True)):
      raise ValueError(f'patch={patch} does not divide frames of {space}; change one')
    if stream and self.stacked:
      raise ValueError('a model with stacked=True cannot be streamed; set it to False')
    if stream and not (self.causal and self.window):
      raise ValueError('only a model with causal=True and a window can be streamed; set both')
    init = nn.initializers.normal(0.02)
    kernel = named(nn.initializers.lecun_normal(), None, None, None, None, 'width')
    bias = named(nn.initializers.zeros_init(), 'width')
    x = _before(self, 'frames', x.astype(self.dtype), self.depth - 1, stream)[0]
    x = nn.Conv(
      self.width, (self.depth, *patch), (1, *patch), 'VALID',
      kernel_init=kernel, bias_init=bias, dtype=self.dtype, name='patches',
    )(x)  # fmt: skip
    x = x.reshape(*x.shape[:2], -1, self.width)
    x = x + self.param('positions', named(init, None, 'width'), x.shape[2:]).astype(self.dtype)
    block = functools.partial(
      remat(_Block, self.keep), self.width, self.heads, self.window, self.causal, stream, self.dtype
    )
    x = blocks(block, x, self.layers, self.stacked)
    x = layer_norm(self.dtype, 'norm')(x).mean(2)
    if not self.each_frame:
      x = x[:, -1] if self.causal else x.mean(1)
    init = nn.initializers.lecun_normal()
    return accurate(dense(self.classes, ('width', None), init, dtype=self.dtype, name='logits')(x))


class _Block(nn.Module):
  """A block of attention over time, attention over space and a multi-layer perceptron, each added to its input."""

  width: int
  heads: int
  window: int
  causal: bool
  stream: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'b t s d']) -> Float[Array, 'b t s d']:
    q, k, v = (jnp.swapaxes(y, 1, 2) for y in self._qkv(x, 'time'))  # (b, s, t, heads, d)
    (k, v), seen = self._joined(k, v)
    before = k.shape[2] - q.shape[2]
    ages = before + jnp.arange(q.shape[2])[:, None] - jnp.arange(k.shape[2])
    y = attend(rotated(q, before), rotated(k, 0), v, self._sees(ages) & seen)
    x = self._added(x, jnp.swapaxes(y, 1, 2), 'time')
    x = self._added(x, attend(*self._qkv(x, 'space')), 'space')
    return feed_forward(x, self.width, self.dtype)

  def _qkv(self, x: Array, name: str) -> list[Float[Array, 'b t s heads e']]:
    """Returns queries, keys and values for attention over time or space."""
    init = nn.initializers.lecun_normal()
    y = layer_norm(self.dtype, f'norm_{name}')(x)
    y = dense(3 * self.width, ('width', 'hidden'), init, dtype=self.dtype, name=f'qkv_{name}')(y)
    y = constrain(y, 'batch', None, None, 'hidden')
    y = y.reshape(*y.shape[:3], self.heads, 3, self.width // self.heads)
    return [y[..., i, :] for i in range(3)]

  def _added(self, x: Array, y: Float[Array, 'b t s heads e'], name: str) -> Float[Array, 'b t s d']:
    """Projects the result of attention and adds it to its input."""
    init = nn.initializers.lecun_normal()
    y = dense(self.width, ('hidden', 'width'), init, dtype=self.dtype, name=f'out_{name}')(y.reshape(x.shape))
    return constrain(x + y, 'batch', None, None, None)

  def _sees(self, ages: Array) -> Bool[Array, 'q k']:
    """Returns whether a query sees a key that is `ages` frames older."""
    sees = ages >= 0 if self.causal else jnp.ones_like(ages, bool)
    return sees & (abs(ages) < self.window) if self.window else sees

  def _joined(self, k: Array, v: Array) -> tuple[tuple[Array, Array], Bool[Array, ' k']]:
    """Puts the keys and values that a stream has kept before the new ones; also returns which of all are real."""
    time_first = lambda y: jnp.swapaxes(y, 1, 2)  # noqa: E731
    count = self.window - 1 if self.stream else 0
    (k, seen), (v, _) = (_before(self, name, time_first(y), count, self.stream) for name, y in (('k', k), ('v', v)))
    return (time_first(k), time_first(v)), seen


def _before(
  module: nn.Module, name: str, x: Float[Array, 'b t *d'], count: int, stream: bool
) -> tuple[Float[Array, 'b n *d'], Bool[Array, ' n']]:
  """Puts the `count` frames before x in front of it; also returns which of all have been seen.

  Those frames are zeros, or what a stream had there.
  """
  past = jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype)
  number = jnp.zeros((), jnp.int32)
  if stream:
    kept = module.variable('stream', name, lambda: past)
    known = module.variable('stream', f'{name}_seen', lambda: number)
    past, number = kept.value, known.value
  whole = jnp.concatenate([past, x], 1) if count else x
  if stream and not module.is_initializing():
    kept.value = whole[:, whole.shape[1] - count :]
    known.value = jnp.minimum(number + x.shape[1], count)
  return whole, jnp.arange(whole.shape[1]) >= count - number


def rotated(x: Float[Array, 'b s t heads d'], first: int) -> Float[Array, 'b s t heads d']:
  """Rotates pairs of features by angles that grow with time (RoPE, Su et al. 2021).

  Products of queries and keys then depend only on their distance in time.
  """
  half = x.shape[-1] // 2
  rates = 100.0 ** -(jnp.arange(half) / half)
  angles = (first + jnp.arange(x.shape[2]))[:, None] * rates
  c, s = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
  a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  return jnp.concatenate([a * c - b * s, a * s + b * c, rest], -1)
