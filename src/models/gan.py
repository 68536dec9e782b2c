"""Class-conditional generators and discriminators of images, after BigGAN (Brock et al. 2019, arXiv:1809.11096)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .layers import accurate, constrain, dense, named

SIZES = {28: (7, (4, 2)), 32: (4, (4, 4, 2)), 64: (4, (8, 4, 2, 1)), 128: (4, (16, 8, 4, 2, 1))}
MOMENTUM = 0.9  # for the running means and variances of batch norms
ATTENTION = 2  # self-attention follows this block of the generator, counted from the last


def _plan(size: int, width: int) -> tuple[int, list[int]]:
  """Returns the side of the smallest features and the channels of the generator's blocks.

  The discriminator's blocks have the reverse order.

  Raises:
    ValueError: the size is unknown.
  """
  if size not in SIZES:
    raise ValueError(f'size={size} is unknown; choose from {", ".join(map(str, SIZES))}')
  side, widths = SIZES[size]
  return side, [width * k for k in widths]


def _conv(features: int, kernel: int, dtype: Any, name: str, out: str = 'mid', rows: str = 'in') -> nn.Conv:
  init = named(nn.initializers.orthogonal(), None, None, rows, out)
  bias = named(nn.initializers.zeros_init(), out)
  return nn.Conv(features, (kernel, kernel), kernel_init=init, bias_init=bias, dtype=dtype, name=name)


class SpectralNorm(nn.Module):
  """A layer whose kernel is divided by its largest singular value (Miyato et al. 2018, arXiv:1802.05957, eq. 8).

  One power iteration a step estimates that value, and gradients flow through it. (flax's layer does not accept kernels
  with named axes.)
  """

  layer: nn.Module

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    def one(kernel: Array) -> Array:
      if kernel.ndim < 2:
        return kernel
      matrix = kernel.reshape(-1, kernel.shape[-1])
      draw = lambda: jax.random.normal(self.make_rng('params'), matrix.shape[-1:])  # noqa: E731
      u = self.variable('spectral', 'u', draw)
      left = _unit(matrix @ u.value.astype(kernel.dtype))
      right = _unit(left @ matrix)
      left, right = jax.lax.stop_gradient((left, right))
      if train and not self.is_initializing():
        u.value = right.astype(u.value.dtype)
      return kernel / (left @ matrix @ right)

    of_kernels = lambda variables: jax.tree.map(one, variables)  # noqa: E731
    run = nn.map_variables(lambda layer: layer(x), 'params', of_kernels, init=self.is_initializing(), mutable=True)
    return run(self.layer)


def _unit(x: Float[Array, ' n']) -> Float[Array, ' n']:
  return x / (jnp.linalg.norm(x) + 1e-12)


def normalised(layer: nn.Module, x: Array, train: bool) -> Array:
  return SpectralNorm(layer, name=f'{layer.name}_norm')(x, train)


class SelfAttention(nn.Module):
  """Attention between positions, with keys and values at half resolution (Zhang et al. 2019, arXiv:1805.08318)."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b h w c']:
    b, h, w, c = x.shape
    small, wide = max(c // 8, 1), max(c // 2, 1)
    one = lambda features, name: normalised(_conv(features, 1, self.dtype, name), x, train)  # noqa: E731
    query = one(small, 'query').reshape(b, h * w, small)
    halved = lambda y: nn.max_pool(y, (2, 2), (2, 2)).reshape(b, -1, y.shape[-1])  # noqa: E731
    key, value = halved(one(small, 'key')), halved(one(wide, 'value'))
    weights = jax.nn.softmax(accurate(query @ jnp.swapaxes(key, 1, 2)))
    attended = (weights.astype(self.dtype) @ value).reshape(b, h, w, wide)
    attended = normalised(_conv(c, 1, self.dtype, 'out', 'in', 'mid'), attended, train)
    return x + self.param('gain', nn.initializers.zeros_init(), ()).astype(self.dtype) * attended


class ConditionalNorm(nn.Module):
  """A batch norm whose scale and shift are linear in a condition. Means are over the whole batch, on any mesh."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], condition: Float[Array, 'b k'], train: bool
  ) -> Float[Array, 'b h w c']:
    norm = nn.BatchNorm(not train, momentum=MOMENTUM, use_bias=False, use_scale=False, dtype=self.dtype, name='batch')
    init = nn.initializers.orthogonal()
    linear = lambda name: dense(x.shape[-1], ('in', 'mid'), init, use_bias=False, dtype=self.dtype, name=name)  # noqa: E731
    scale, shift = (normalised(linear(name), condition, train)[:, None, None] for name in ('scale', 'shift'))
    return norm(x) * (1 + scale) + shift


class GeneratorBlock(nn.Module):
  """A residual block that doubles the resolution and whose norms depend on the condition."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], condition: Float[Array, 'b k'], train: bool
  ) -> Float[Array, 'b h2 w2 d']:
    up = lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)  # noqa: E731
    y = up(nn.relu(ConditionalNorm(self.dtype, name='norm_first')(x, condition, train)))
    y = normalised(_conv(self.features, 3, self.dtype, 'first'), y, train)
    y = nn.relu(ConditionalNorm(self.dtype, name='norm_second')(y, condition, train))
    y = normalised(_conv(self.features, 3, self.dtype, 'second', 'in', 'mid'), y, train)
    return y + normalised(_conv(self.features, 1, self.dtype, 'skip'), up(x), train)


class Generator(nn.Module):
  """Maps noise and classes to images in [0, 1], after BigGAN (Brock et al. 2019, arXiv:1809.11096).

  `apply(variables, noise, label, train=False)` takes noise, (b, latent), and the class of each image, (b,). It returns
  images, (b, size, size, channels), in at least float32. With `train`, batch norms use the batch and update their
  running means, and each spectral norm takes a step of its power iteration; the collections 'batch_stats' and
  'spectral' must then be mutable.

  Attributes:
    size: the side of the images: 28, 32, 64 or 128.
    channels: the channels of the images.
    classes: the number of classes.
    width: the channels of a block, before its factor, which depends on the size (`SIZES` in the module).
    latent: the length of the noise, which divides by the number of blocks and one more: 3 parts for size 28, 4 for 32,
      5 for 64, 6 for 128. Every block takes a part of the noise beside the class.
    embedding: the length of a class's features.
    attention: whether self-attention follows the block before the last one.
    dtype: the type of the computation; parameters are float32.

  Raises:
    ValueError: the size is unknown, or `latent` does not divide.
  """

  size: int
  channels: int
  classes: int
  width: int
  latent: int = 64
  embedding: int = 32
  attention: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, noise: Float[Array, 'b latent'], label: Int[Array, ' b'], train: bool = False
  ) -> Float[Array, 'b h w c']:
    side, widths = _plan(self.size, self.width)
    if self.latent % (len(widths) + 1):
      raise ValueError(f'latent={self.latent} does not divide by the {len(widths) + 1} parts that blocks take')
    first, *parts = jnp.split(noise.astype(self.dtype), len(widths) + 1, axis=1)
    init = named(nn.initializers.orthogonal(), None, 'in')
    shared = nn.Embed(self.classes, self.embedding, embedding_init=init, dtype=self.dtype, name='classes')(label)
    start = dense(side * side * widths[0], ('in', 'mid'), nn.initializers.orthogonal(), dtype=self.dtype, name='start')
    x = normalised(start, first, train).reshape(-1, side, side, widths[0])
    for i, (features, part) in enumerate(zip(widths, parts, strict=True)):
      x = GeneratorBlock(features, self.dtype, name=f'block_{i}')(x, jnp.concatenate([shared, part], 1), train)
      x = constrain(x, 'batch', None, None, None)
      if self.attention and i == len(widths) - ATTENTION:
        x = SelfAttention(self.dtype, name='attention')(x, train)
    x = nn.relu(nn.BatchNorm(not train, momentum=MOMENTUM, dtype=self.dtype, name='norm')(x))
    x = normalised(_conv(self.channels, 3, self.dtype, 'pixels', None), x, train)
    return jax.nn.sigmoid(accurate(x))


class DiscriminatorBlock(nn.Module):
  """A residual block, which halves the resolution if `halves` is set."""

  features: int
  halves: bool
  first: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b h2 w2 d']:
    half = (lambda x: nn.avg_pool(x, (2, 2), (2, 2))) if self.halves else (lambda x: x)
    y = x if self.first else nn.relu(x)
    y = nn.relu(normalised(_conv(self.features, 3, self.dtype, 'first'), y, train))
    y = half(normalised(_conv(self.features, 3, self.dtype, 'second', 'in', 'mid'), y, train))
    return y + normalised(_conv(self.features, 1, self.dtype, 'skip'), half(x), train)


class Discriminator(nn.Module):
  """Maps images and their classes to scores of how real they look (Miyato and Koyama 2018, arXiv:1802.05637, eq. 5).

  A score is a linear function of the image's features, plus their product with the class's.

  `apply(variables, x, label, train=False)` takes images x in [0, 1], (b, size, size, c), and the class of each image,
  (b,). It returns scores, (b,), in at least float32; a larger one says that the image looks more real. With `train`,
  each spectral norm takes a step of its power iteration; the collection 'spectral' must then be mutable.

  Attributes:
    size: the side of the images: 28, 32, 64 or 128.
    classes: the number of classes.
    width: the channels of a block, before its factor, which depends on the size (`SIZES` in the module).
    attention: whether self-attention follows the first block.
    dtype: the type of the computation; parameters are float32.

  Raises:
    ValueError: the size is unknown.
  """

  size: int
  classes: int
  width: int
  attention: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], label: Int[Array, ' b'], train: bool = False) -> Float[Array, ' b']:
    _, widths = _plan(self.size, self.width)
    x = (2 * x - 1).astype(self.dtype)
    for i, features in enumerate(widths[::-1]):
      x = DiscriminatorBlock(features, True, i == 0, self.dtype, name=f'block_{i}')(x, train)
      x = constrain(x, 'batch', None, None, None)
      if self.attention and i == ATTENTION - 2:
        x = SelfAttention(self.dtype, name='attention')(x, train)
    x = nn.relu(DiscriminatorBlock(widths[0], False, dtype=self.dtype, name='last')(x, train)).sum((1, 2))
    init = nn.initializers.orthogonal()
    linear = dense(1, ('in', None), init, dtype=self.dtype, name='real')
    table = named(init, None, 'in')
    classes = nn.Embed(self.classes, widths[0], embedding_init=table, dtype=self.dtype, name='classes')
    product = (normalised(classes, label, train) * x).sum(1)
    return accurate(normalised(linear, x, train)[:, 0] + product)
