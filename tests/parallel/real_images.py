"""Builds networks for images and clips at real sizes. `IMAGES`: name -> function -> `Case`."""

import functools
from collections.abc import Callable, Sequence

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from kronmesh import kron, models
from tests.parallel.real_cases import Case, cross_entropy, f32, i32, linen, sigmoid_cross_entropy, variables

IMAGE, CLIP = f32(224, 224, 3), f32(16, 112, 112, 3)
norm = functools.partial(nn.BatchNorm, use_running_average=False)
conv = functools.partial(nn.Conv, use_bias=False)


def resnet50(dtype=jnp.float32, **options):
  """Returns ResNet-50's case, as experiments/configs/imagenet_resnet50.py has it."""
  module = models.ResNet(blocks=(3, 4, 6, 3), classes=1000, dtype=dtype)
  return linen(module, IMAGE, train=True, options=options)


class Convolutions(nn.Module):
  """Classifies by two convolutions, the smallest network whose statistics once gathered its activations."""

  groups: int = 1

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(64, (3, 3))(x))
    x = nn.relu(nn.Conv(64, (3, 3), feature_group_count=self.groups)(x))
    return nn.Dense(10)(x.mean((1, 2)))


def equinox_cnn():
  """Returns the case of a network under vmap, with channels before space."""
  keys = jax.random.split(jax.random.key(0), 4)

  def make():
    return eqx.nn.Sequential([
      eqx.nn.Conv2d(3, 64, 3, padding=1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
      eqx.nn.Conv2d(64, 128, 3, padding=1, key=keys[1]), eqx.nn.Lambda(jax.nn.relu),
      eqx.nn.Conv2d(128, 128, 3, 2, padding=1, key=keys[2]), eqx.nn.Lambda(lambda x: x.mean((1, 2))),
      eqx.nn.Linear(128, 10, key=keys[3]),
    ])  # fmt: skip

  params, static = eqx.partition(eqx.filter_eval_shape(make), lambda x: isinstance(x, jax.ShapeDtypeStruct))

  def loss(params, state, batch, key):
    del state, key
    x, y = batch
    return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

  return Case(loss, params, {}, (f32(3, 32, 32), i32()))


class ConvNeXt(nn.Module):
  """Classifies by depthwise convolutions of 7x7 and wide perceptrons."""

  depths: Sequence[int] = (3, 3, 9, 3)
  widths: Sequence[int] = (96, 192, 384, 768)

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Conv(self.widths[0], (4, 4), (4, 4))(x))
    for stage, (depth, c) in enumerate(zip(self.depths, self.widths, strict=True)):
      if stage:
        x = nn.Conv(c, (2, 2), (2, 2))(nn.LayerNorm()(x))
      for k in range(depth):
        y = nn.LayerNorm()(nn.Conv(c, (7, 7), feature_group_count=c)(x))
        y = nn.Dense(c)(nn.gelu(nn.Dense(4 * c)(y)))
        x = x + self.param(f'layer_scale_{stage}_{k}', nn.initializers.constant(1e-6), (c,)) * y
    return nn.Dense(1000)(nn.LayerNorm()(x.mean((1, 2))))


class MobileNet(nn.Module):
  """Classifies by inverted residuals with squeeze and excite; a stage is (factor, channels, repeats, stride)."""

  stages: Sequence[tuple[int, int, int, int]] = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
  )  # fmt: skip

  @nn.compact
  def __call__(self, x):
    x = nn.relu6(norm()(conv(32, (3, 3), (2, 2))(x)))
    for factor, channels, repeats, stride in self.stages:
      for k in range(repeats):
        x = self.block(x, factor * x.shape[-1], channels, stride if k == 0 else 1)
    x = nn.relu6(norm()(conv(1280, (1, 1))(x)))
    return nn.Dense(1000)(x.mean((1, 2)))

  def block(self, x, wide, channels, stride):
    y = nn.relu6(norm()(conv(wide, (1, 1))(x)))
    y = nn.relu6(norm()(conv(wide, (3, 3), (stride, stride), feature_group_count=wide)(y)))
    squeezed = nn.hard_sigmoid(nn.Dense(wide)(nn.relu(nn.Dense(wide // 4)(y.mean((1, 2))))))
    y = norm()(conv(channels, (1, 1))(y * squeezed[:, None, None]))
    return x + y if x.shape == y.shape else y


class UNet(nn.Module):
  """Labels pixels; four times down and up again."""

  widths: Sequence[int] = (64, 128, 256, 512, 1024)

  @nn.compact
  def __call__(self, x):
    twice = lambda c, x: nn.relu(nn.Conv(c, (3, 3))(nn.relu(nn.Conv(c, (3, 3))(x))))  # noqa: E731
    skips = []
    for c in self.widths[:-1]:
      x = twice(c, x)
      skips.append(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = twice(self.widths[-1], x)
    for c, skip in zip(self.widths[-2::-1], skips[::-1], strict=True):
      x = twice(c, jnp.concatenate([skip, nn.ConvTranspose(c, (2, 2), (2, 2))(x)], -1))
    return nn.Conv(2, (1, 1))(x)


class Block(nn.Module):
  """Adds attention and a multi-layer perceptron to a residual stream."""

  heads: int

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))


class ViT(nn.Module):
  """Classifies by a class token, as ViT-S/16."""

  layers: int = 12
  width: int = 384

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.width, (16, 16), (16, 16))(x)
    x = x.reshape(x.shape[0], -1, self.width)
    init = nn.initializers.normal(0.02)
    token = self.param('class_token', init, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
    x = x + self.param('positions', init, (1, x.shape[1], self.width))
    for _ in range(self.layers):
      x = Block(6)(x)
    return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


class VideoTransformer(nn.Module):
  """Attends over space and over time in turn (TimeSformer), with the other axis folded into the batch."""

  layers: int = 4
  width: int = 384

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.width, (2, 16, 16), (2, 16, 16))(x)
    b, t, h, w, c = x.shape
    init = nn.initializers.normal(0.02)
    x = x + self.param('space', init, (h, w, c)) + self.param('time', init, (t, 1, 1, c))
    x = rearrange(x, 'b t h w c -> b t (h w) c')
    for _ in range(self.layers):
      x = Block(6)(rearrange(x, 'b t s c -> (b t) s c'))
      x = Block(6)(rearrange(x, '(b t) s c -> (b s) t c', b=b))
      x = rearrange(x, '(b s) t c -> b t s c', b=b)
    return nn.Dense(400)(nn.LayerNorm()(x).mean((1, 2)))


class Mixer(nn.Module):
  """Classifies by perceptrons over tokens and over channels, as Mixer-S/16."""

  layers: int = 8
  width: int = 512

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.width, (16, 16), (16, 16))(x).reshape(x.shape[0], -1, self.width)
    mlp = lambda wide, x: nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(wide)(x)))  # noqa: E731
    for _ in range(self.layers):
      x = x + mlp(self.width // 2, nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
      x = x + mlp(4 * self.width, nn.LayerNorm()(x))
    return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


class Swin(nn.Module):
  """Attends within windows of 7x7, shifted every second time, with tables of relative positions."""

  depths: Sequence[int] = (2, 2, 2, 2)
  width: int = 96

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Conv(self.width, (4, 4), (4, 4))(x))
    for stage, depth in enumerate(self.depths):
      if stage:
        x = nn.LayerNorm()(rearrange(x, 'b (h i) (w j) c -> b h w (i j c)', i=2, j=2))
        x = nn.Dense(self.width * 2**stage, use_bias=False)(x)
      for k in range(depth):
        x = jnp.roll(x, (-3 * (k % 2),) * 2, (1, 2))
        x = jnp.roll(self.windows(x, 3 * 2**stage, f'{stage}_{k}'), (3 * (k % 2),) * 2, (1, 2))
        x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))
    return nn.Dense(1000)(nn.LayerNorm()(x).mean((1, 2)))

  def windows(self, x, heads, name):
    place = np.stack(np.meshgrid(range(7), range(7), indexing='ij'), -1).reshape(-1, 2)
    relative = (place[:, None] - place[None] + 6) @ np.array([13, 1])
    b, h, _, c = x.shape
    y = rearrange(nn.LayerNorm()(x), 'b (h i) (w j) c -> (b h w) (i j) c', i=7, j=7)
    q, k, v = rearrange(nn.Dense(3 * c)(y), 'b t (n h d) -> n b h t d', n=3, h=heads)
    table = self.param(f'relative_{name}', nn.initializers.normal(0.02), (169, heads))
    scores = jnp.einsum('bhtd,bhsd->bhts', q, k) / np.sqrt(c / heads) + table[relative].transpose(2, 0, 1)
    y = nn.Dense(c)(rearrange(jax.nn.softmax(scores) @ v, 'b h t d -> b t (h d)'))
    return x + rearrange(y, '(b h w) (i j) c -> b (h i) (w j) c', b=b, h=h // 7, i=7)


class Generator(nn.Module):
  """Makes images of 64x64, as DCGAN."""

  @nn.compact
  def __call__(self, z):
    x = nn.relu(norm()(nn.Dense(4 * 4 * 1024)(z).reshape(-1, 4, 4, 1024)))
    for c in (512, 256, 128):
      x = nn.relu(norm()(nn.ConvTranspose(c, (4, 4), (2, 2), use_bias=False)(x)))
    return nn.tanh(nn.ConvTranspose(3, (4, 4), (2, 2))(x))


class Discriminator(nn.Module):
  """Judges images, as DCGAN, with spectral norm on every layer."""

  @nn.compact
  def __call__(self, x):
    for c in (128, 256, 512, 1024):
      x = nn.leaky_relu(nn.SpectralNorm(nn.Conv(c, (4, 4), (2, 2)))(x, update_stats=False))
    return nn.SpectralNorm(nn.Dense(1))(x.reshape(x.shape[0], -1), update_stats=False)


def generator():
  """Returns the case of a generator, whose loss goes through a fixed discriminator."""
  real, image = Discriminator(), f32(64, 64, 3)
  (params, state), (fixed, power) = variables(Generator(), f32(100)), variables(real, image)

  def loss(params, state, batch, key):
    del key
    made = Generator().apply({'params': params, **state['generator']}, batch[0], mutable=['batch_stats'])[0]
    return sigmoid_cross_entropy(real.apply({'params': state['fixed'], **state['power']}, made), 1.0)

  return Case(loss, params, {'generator': state, 'fixed': fixed, 'power': power}, (f32(100),))


class WeightNormed(nn.Module):
  """Classifies by convolutions whose kernels have normalised columns (Salimans and Kingma 2016)."""

  @nn.compact
  def __call__(self, x):
    for c, stride in ((96, 1), (96, 2), (192, 1), (192, 2)):
      x = nn.leaky_relu(nn.WeightNorm(nn.Conv(c, (3, 3), (stride, stride)))(x))
    return nn.WeightNorm(nn.Dense(10))(x.mean((1, 2)))


def autoencoder():
  """Returns the case of the deep autoencoder of digits."""

  def objective(logits, y):
    logits = kron.observe.bernoulli(logits)
    return -(y.reshape(logits.shape) * logits - jax.nn.softplus(logits)).sum(-1).mean()

  return linen(models.Autoencoder((1000, 500, 250, 30)), f32(28, 28, 1), target=f32(28, 28, 1), objective=objective)


def segmented():
  """Returns the U-Net's case, whose loss is a mean over pixels."""
  return linen(UNet(), f32(256, 256, 3), target=i32(256, 256), each=8)


IMAGES: dict[str, Callable[[], Case]] = {
  'two 3x3 convolutions': lambda: linen(Convolutions(), f32(28, 28, 3)),
  'ResNet-50': resnet50,
  'ResNet-50, bf16, an eighth': lambda: resnet50(jnp.bfloat16, subsample=1 / 8),
  'grouped convolutions': lambda: linen(Convolutions(groups=32), f32(28, 28, 3)),
  'CNN in equinox': equinox_cnn,
  'ConvNeXt-T': lambda: linen(ConvNeXt(), IMAGE),
  'MobileNetV2, squeeze and excite': lambda: linen(MobileNet(), IMAGE),
  'U-Net': segmented,
  '3-D ResNet-18': lambda: linen(models.ResNet((2, 2, 2, 2), 400, bottleneck=False), CLIP, train=True),
  'R(2+1)D-18': lambda: linen(models.R2Plus1D((2, 2, 2, 2), 400), CLIP, train=True),
  'ViT-S/16': lambda: linen(ViT(), IMAGE),
  'video transformer, folded': lambda: linen(VideoTransformer(), CLIP, each=8),
  'video transformer, stacked': lambda: linen(
    models.VideoTransformer(400, width=384, heads=6, stacked=True), CLIP, each=8
  ),
  'Mixer-S/16': lambda: linen(Mixer(), IMAGE),
  'Swin': lambda: linen(Swin(), IMAGE),
  'DCGAN generator': generator,
  'DCGAN discriminator, spectral norm': lambda: linen(
    Discriminator(), f32(64, 64, 3), target=f32(1), objective=sigmoid_cross_entropy
  ),
  'weight norm': lambda: linen(WeightNormed(), f32(32, 32, 3)),
  'deep autoencoder': autoencoder,
}
