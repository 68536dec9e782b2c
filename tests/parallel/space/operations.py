"""Operations of images, each as a function of an image (b, h, w, 4) and a weight: what strips must not change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kronmesh import models, parallel
from tests.draws import normal

WIDTH = 6


class Operation(NamedTuple):
  """weight: its shape; () of one for each channel, to multiply by. multiple, least: of the image's height."""

  fn: Callable
  weight: tuple[int, ...]
  multiple: int = 1
  least: int = 1


def conv(strides=(1, 1), padding='SAME', base=None, dilation=None, groups=1):
  def fn(x, w):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(x, w, strides, padding, base, dilation, numbers, feature_group_count=groups)

  return fn


def conv3d(x, w):
  """The height is an axis of its own; time is the width, cut in two."""
  clip = x.reshape(x.shape[0], x.shape[1], 2, 3, 4).transpose(0, 2, 1, 3, 4)
  return lax.conv_general_dilated(clip, w, (1, 2, 1), 'SAME', dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'))


def transposed(strides, padding):
  return lambda x, w: lax.conv_transpose(x, w, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def group_norm(x, w):
  return nn.GroupNorm(2).apply({'params': {'scale': w, 'bias': w}}, x)


def batch_norm(x, w):
  norm = nn.BatchNorm(use_running_average=False)
  state = {'mean': jnp.zeros_like(w), 'var': jnp.ones_like(w)}
  return norm.apply({'params': {'scale': w, 'bias': w}, 'batch_stats': state}, x, mutable=['batch_stats'])[0]


def space_to_depth(x, w):
  b, h, _, c = x.shape
  return (
    (x * w).reshape(b, h // 2, 2, WIDTH // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, WIDTH // 2, 4 * c)
  )


def tokens(x, w):
  """With a position of its own for each."""
  places = jnp.sin(jnp.arange(x.shape[1] * WIDTH * 4.0)).reshape(-1, 4).astype(x.dtype)
  return (x.reshape(x.shape[0], -1, 4) + places) @ w


def attention(x, w):
  q = (x.reshape(x.shape[0], -1, 2, 2) * w).astype(x.dtype)
  return models.attention.attend(q, jnp.sin(q), jnp.cos(q))


def causal(x, w):
  q = (x.reshape(x.shape[0], -1, 2, 2) * w).astype(x.dtype)
  return models.attention.attend(q, jnp.sin(q), jnp.cos(q), jnp.tri(q.shape[1], dtype=bool))


def loop(x, w):
  """One kernel in a loop, rematerialised."""
  body = jax.checkpoint(lambda x, _: (jnp.tanh(conv()(x, w)), x.mean((1, 2))))
  x, means = lax.scan(body, x, None, length=3)
  return x + means.sum(0)[:, None, None]


def branch(x, w):
  return lax.cond(w.sum() > 1e6, lambda x: x * w, lambda x: jnp.maximum(x, 0.1) * w[0], x)


def many(x, w):
  """Most kinds of operations one after another, so that one compiled program tries them all."""
  y = conv()(x, w)
  y = (
    nn.max_pool(y, (3, 3), (1, 1), 'SAME')
    + nn.avg_pool(y, (2, 2), (1, 1), 'SAME')
    - nn.max_pool(-y, (2, 2), (1, 1), 'SAME')
  )
  y = y * jax.nn.softmax(y, axis=1) + jnp.exp(-(y**2)).mean((1, 2), keepdims=True)
  y = jnp.pad(y, ((0, 0), (2, 2), (1, 1), (0, 0)), mode='reflect')[:, 1:-3, 2:]
  y = jnp.concatenate([y, jnp.roll(y, 1, axis=1), jnp.pad(y[:, :-1], ((0, 0), (0, 1), (0, 0), (0, 0)))], -1)[..., 1::3]
  y = y + 0.5 * y[:, ::-1] + jnp.repeat(y, 2, axis=1)[:, ::2]
  y = jnp.stack([*jnp.moveaxis(y, 2, 0)], 2)
  y = (y.reshape(y.shape[0], -1, 4) @ w[0, 0]).reshape(y.shape)
  return group_norm(conv((2, 2), dilation=(2, 1))(y, w), w[0, 0, 0])


OPERATIONS = {
  'many': Operation(many, (3, 3, 4, 4)),
  'conv': Operation(conv(), (3, 3, 4, 5)),
  'even kernel': Operation(conv(), (4, 2, 4, 5)),
  'strided': Operation(conv((2, 2)), (3, 3, 4, 5)),
  'stem': Operation(conv((2, 2), [(3, 3), (3, 3)]), (7, 7, 4, 5)),
  'valid': Operation(conv(padding='VALID'), (3, 3, 4, 5), least=5),
  'patches': Operation(conv((2, 2), 'VALID'), (2, 2, 4, 5), least=5),
  'dilated': Operation(conv(dilation=(3, 2)), (3, 3, 4, 5)),
  'depthwise': Operation(conv(groups=4), (3, 3, 1, 8)),
  'grouped': Operation(conv(groups=2), (3, 3, 2, 6)),
  'transposed': Operation(transposed((2, 2), 'SAME'), (3, 3, 4, 5)),
  'transposed by three': Operation(transposed((3, 3), 'VALID'), (4, 4, 4, 5)),
  'clip': Operation(conv3d, (3, 3, 3, 4, 5)),
  'max pool': Operation(lambda x, w: nn.max_pool(x * w, (3, 3), (2, 2), 'SAME'), ()),
  'min pool': Operation(lambda x, w: -nn.max_pool(-x * w, (2, 2), (2, 2), 'VALID'), (), least=5),
  'average pool': Operation(lambda x, w: nn.avg_pool(x * w, (2, 2), (2, 2), 'SAME'), ()),
  'average of what is there': Operation(
    lambda x, w: nn.avg_pool(x * w, (3, 3), (1, 1), [(1, 1), (1, 1)], count_include_pad=False), ()
  ),
  'mean': Operation(lambda x, w: jnp.exp(x) * w / jnp.exp(x).mean((1, 2), keepdims=True), ()),
  'softmax along rows': Operation(lambda x, w: jax.nn.softmax(x * w, axis=1), ()),
  'largest': Operation(lambda x, w: (x * w).max((1, 2)) - jnp.round(x * w).min(1).sum(1), ()),
  'group norm': Operation(group_norm, (4,)),
  'batch norm': Operation(batch_norm, (4,)),
  'activations': Operation(lambda x, w: jax.nn.relu(jax.nn.gelu(x) * w) + jax.nn.silu(x) * (x > 0), ()),
  'repeat': Operation(lambda x, w: jnp.repeat(x * w, 2, axis=1), ()),
  'resize up': Operation(lambda x, w: jax.image.resize(x * w, (2, 2 * x.shape[1], 12, 4), 'bilinear'), ()),
  'resize down': Operation(lambda x, w: jax.image.resize(x * w, (2, x.shape[1] // 2, 3, 4), 'bicubic'), (), least=6),
  'nearest': Operation(lambda x, w: jax.image.resize(x * w, (2, 2 * x.shape[1] + 1, 3, 4), 'nearest'), ()),
  'reflected': Operation(lambda x, w: jnp.pad(x * w, ((0, 0), (2, 2), (1, 1), (0, 0)), mode='reflect'), ()),
  'constant border': Operation(lambda x, w: jnp.pad(x * w, ((0, 0), (2, 1), (0, 0), (0, 0)), constant_values=3), ()),
  'space to depth': Operation(space_to_depth, (), multiple=2),
  'tokens': Operation(tokens, (4, 3)),
  'attention': Operation(attention, (2,)),
  'causal attention': Operation(causal, (2,)),
  'slice': Operation(lambda x, w: x[:, 1:-1:2] * w, ()),
  'mirrored': Operation(lambda x, w: x[:, ::-1] * w + x, ()),
  'rolled': Operation(lambda x, w: jnp.roll(x, 1, axis=1) * w * x, ()),
  'apart and together': Operation(lambda x, w: jnp.stack([*jnp.moveaxis(x * w, 2, 0)], 1) * w, ()),
  'side by side': Operation(lambda x, w: jnp.concatenate([x * w, jnp.maximum(x, 0)], -1), ()),
  'loop': Operation(loop, (3, 3, 4, 4)),
  'branch': Operation(branch, (4,)),
}


def errors(fn: Callable, x: Any, w: Any, mesh: Any, columns: bool = False) -> dict[str, float]:
  """Norm-relative differences of result, value and gradients between strips and the whole image.

  Padding holds NaN: whatever reads it shows.
  """
  own = {1: parallel.strip(mesh, 'space', x.shape[1])}
  if columns:
    own[2] = parallel.strip(mesh, 'columns', x.shape[2])

  def loss(fn):
    def value(x, w):
      y = fn(x, w)
      return (jnp.log1p(y**2) * jnp.arange(1, y.size + 1).reshape(y.shape)).sum() / y.size**2

    return value

  def results(run, x):
    both = jax.jit(lambda x, w: (run(fn)(x, w), jax.value_and_grad(run(loss(fn)), (0, 1))(x, w)))
    y, (value, (dx, dw)) = both(x, w)
    return {'result': y, 'value': value, 'dx': dx, 'dw': dw}

  whole = results(lambda f: f, x)
  strips = results(lambda f: parallel.partition(f, mesh, (own, None)), padded(x, own))
  for dim, strip in own.items():
    strips['dx'] = jnp.compress(strip.places >= 0, strips['dx'], dim)

  def apart(a, b):
    """What is all zeros has no norm to be relative to."""
    return float(jnp.linalg.norm(jnp.ravel(a - b)) / (jnp.linalg.norm(jnp.ravel(b)) or 1))

  return {k: apart(strips[k], whole[k]) for k in whole}


def padded(x: Any, own: dict[int, Any]) -> Any:
  for dim, strip in own.items():
    x = jnp.take(x, np.where(strip.places < 0, strip.size, strip.places), dim, mode='fill', fill_value=jnp.nan)
  return x


def case(name: str, height: int, dtype: Any) -> tuple[Callable, Any, Any]:
  operation = OPERATIONS[name]
  weight = normal(*operation.weight, seed=1) if operation.weight else 1 + abs(normal(4, seed=1))
  return operation.fn, normal(2, height, WIDTH, 4).astype(dtype), jnp.asarray(weight, dtype)
