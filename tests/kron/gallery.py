"""A gallery of architectures at toy size, in the frameworks people write them in. `GALLERY`: name -> function -> `Case`.

Seven examples a batch, and no other length that seven divides, so that the reference can tell which axis counts them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from kronmesh import kron, models
from tests.draws import integers, normal, normals

N = 7
KEY = jax.random.key(0)


class Case(NamedTuple):
  """loss(params, *args); `state`: positions of the arguments that hold no examples."""

  framework: str
  loss: Callable
  params: Any
  args: tuple
  state: tuple[int, ...] = ()
  examples: int = N
  has_aux: bool = False


def labels(classes=3):
  return jnp.arange(N) % classes


def cross_entropy(logits, y):
  logits = kron.observe.categorical(logits, y)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def squared(z, y=0.3):
  return 0.5 * ((kron.observe.gaussian(z.reshape(z.shape[0], -1)) - y) ** 2).sum(-1).mean()


def jittered(params):
  """No parameter stays at zero or one, where a wrong factor could hide."""
  leaves, treedef = jax.tree.flatten(params)
  draws = [normal(*p.shape, seed=(7, k), scale=0.1, dtype=p.dtype) for k, p in enumerate(leaves)]
  return treedef.unflatten([jnp.asarray(np.asarray(p) + np.asarray(d)) for p, d in zip(leaves, draws, strict=True)])


def linen(module, x, y=None, objective=cross_entropy, **kwargs):
  """A classifier (or what `objective` makes of it) of a flax.linen module, its other collections as one more argument."""
  variables = dict(nn.meta.unbox(jax.jit(functools.partial(module.init, **kwargs))(KEY, x)))
  params = jittered(variables.pop('params'))
  y = labels() if y is None else y

  def loss(params, x, y, state):
    apply = functools.partial(module.apply, {'params': params, **state}, x, **kwargs)
    out = apply(mutable=list(state))[0] if state else apply()
    return objective(out, y)

  return Case('flax.linen', loss, params, (x, y, variables), (2,))


def plain(network, params, x, y=None, objective=cross_entropy):
  loss = lambda params, x, y: objective(network(params, x), y)  # noqa: E731
  return Case('plain', loss, params, (x, labels() if y is None else y))


def layer_norm(x, scale, shift):
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + shift


# --- images --------------------------------------------------------------------------------------------------------


def mlp():
  net = eqx.nn.MLP(4, 3, 5, 2, activation=jax.nn.tanh, key=KEY)
  params, static = eqx.partition(net, eqx.is_inexact_array)
  loss = lambda p, x, y: cross_entropy(jax.vmap(eqx.combine(p, static))(x), y)  # noqa: E731
  return Case('equinox', loss, params, (normal(N, 4), labels()))


def autoencoder():
  def objective(logits, y):
    logits = kron.observe.bernoulli(logits)
    return optax.sigmoid_binary_cross_entropy(logits, y.reshape(logits.shape)).sum(-1).mean()

  x = jax.nn.sigmoid(normal(N, 3, 3, 1))
  return linen(models.Autoencoder(widths=(6, 4)), x, x, objective)


def resnet():
  return linen(models.ResNet(blocks=(1, 1), classes=3, width=4, stem='small'), normal(N, 6, 6, 3), train=True)


def haiku_cnn():
  def forward(x):
    x = hk.Conv2D(4, 3, stride=2)(x)
    x = jax.nn.relu(hk.GroupNorm(2)(x))
    x = hk.Conv2D(6, 2, padding='VALID', with_bias=False)(x)
    return hk.Linear(3)(x.mean((1, 2)))

  net, x = hk.without_apply_rng(hk.transform(forward)), normal(N, 6, 6, 3)
  return plain(net.apply, jittered(jax.jit(net.init)(KEY, x)), x)._replace(framework='haiku')


def equinox_cnn():
  keys = jax.random.split(KEY, 3)
  net = eqx.nn.Sequential([
    eqx.nn.Conv2d(2, 4, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Conv2d(4, 4, 2, groups=2, key=keys[1]),
    eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(16, 3, key=keys[2]),
  ])  # fmt: skip
  params, static = eqx.partition(net, eqx.is_inexact_array)
  loss = lambda p, x, y: cross_entropy(jax.vmap(eqx.combine(p, static))(x), y)  # noqa: E731
  return Case('equinox', loss, params, (normal(N, 2, 5, 5), labels()))


def nnx_cnn():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
      return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

  graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
  loss = lambda p, x, y, rest: cross_entropy(nnx.merge(graph, p, rest, copy=True)(x), y)  # noqa: E731
  return Case('flax.nnx', loss, jittered(params), (normal(N, 5, 5, 3), labels(), rest), (2,))


class ConvNeXtBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    c = x.shape[-1]
    y = nn.Conv(c, (3, 3), feature_group_count=c)(x)
    y = nn.Dense(c)(nn.gelu(nn.Dense(2 * c)(nn.LayerNorm()(y))))
    return x + self.param('layer_scale', nn.initializers.constant(0.5), (c,)) * y


class ConvNeXt(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Conv(4, (2, 2), (2, 2))(x))
    x = ConvNeXtBlock()(ConvNeXtBlock()(x))
    return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


class MobileNet(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
    x = nn.relu6(norm()(nn.Conv(4, (3, 3), (2, 2), use_bias=False)(x)))
    y = nn.relu6(norm()(nn.Conv(8, (1, 1), use_bias=False)(x)))
    y = nn.relu6(norm()(nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(y)))
    squeezed = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(2)(y.mean((1, 2))))))  # squeeze and excite
    y = norm()(nn.Conv(4, (1, 1), use_bias=False)(y * squeezed[:, None, None]))
    return nn.Dense(3)((x + y).mean((1, 2)))


class UNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    down = nn.relu(nn.Conv(4, (3, 3))(x))
    low = nn.relu(nn.Conv(6, (3, 3), (2, 2))(down))
    up = nn.relu(nn.ConvTranspose(4, (2, 2), (2, 2))(low))
    return nn.Conv(2, (1, 1))(nn.relu(nn.Conv(4, (3, 3))(jnp.concatenate([down, up], -1))))


def unet():
  def objective(z, y):
    return cross_entropy(z, y)

  y = (normal(N, 4, 4) > 0).astype(jnp.int32)
  case = linen(UNet(), normal(N, 4, 4, 3), y, objective)
  return case


class ResNet3D(nn.Module):
  factorised: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3, 3), (1, 2, 2))(x)))
    if self.factorised:
      y = nn.Conv(4, (3, 1, 1))(nn.relu(nn.Conv(5, (1, 3, 3), use_bias=False)(x)))
    else:
      y = nn.Conv(4, (3, 3, 3))(x)
    return nn.Dense(3)(nn.relu(x + nn.GroupNorm(2)(y)).mean((1, 2, 3)))


class Encoder(nn.Module):
  width: int = 4

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    return x + nn.Dense(self.width)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))


class ViT(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (2, 2), (2, 2), name='patches')(x)
    x = x.reshape(x.shape[0], -1, 4)
    token = self.param('class_token', nn.initializers.normal(1.0), (1, 1, 4))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
    x = x + self.param('positions', nn.initializers.normal(1.0), (1, x.shape[1], 4))
    x = Encoder()(x)
    return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class VideoTransformer(nn.Module):
  """Tubelets, then attention over space and over time in turn."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (2, 2, 2), (2, 2, 2), name='tubelets')(x)
    b, t, h, w, c = x.shape
    x = x + self.param('space', nn.initializers.normal(1.0), (h, w, c))
    x = x + self.param('time', nn.initializers.normal(1.0), (t, 1, 1, c))
    x = Encoder()(rearrange(x, 'b t h w c -> (b t) (h w) c'))
    x = rearrange(x, '(b t) s c -> b s t c', b=b)
    x = Encoder()(rearrange(x, 'b s t c -> (b s) t c'))
    return nn.Dense(3)(rearrange(x, '(b s) t c -> b (s t) c', b=b).mean(1))


class Mixer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (2, 2), (2, 2))(x).reshape(x.shape[0], -1, 4)
    y = nn.LayerNorm()(x).swapaxes(1, 2)
    x = x + nn.Dense(4)(nn.gelu(nn.Dense(5)(y))).swapaxes(1, 2)
    x = x + nn.Dense(4)(nn.gelu(nn.Dense(5)(nn.LayerNorm()(x))))
    return nn.Dense(3)(x.mean(1))


def swin():
  """Attention in windows, with a table of relative positions."""
  window = np.stack(np.meshgrid(range(2), range(2), indexing='ij'), -1).reshape(-1, 2)
  relative = (window[:, None] - window[None] + 1) @ np.array([3, 1])

  def network(p, x):
    x = rearrange(x, 'b (h i) (w j) c -> (b h w) (i j) c', i=2, j=2) @ p['embed']
    q, k, v = jnp.split(layer_norm(x, p['scale'], p['shift']) @ p['qkv'], 3, -1)
    heads = functools.partial(rearrange, pattern='b t (h d) -> b h t d', h=2)
    bias = p['table'][relative].transpose(2, 0, 1)
    scores = jnp.einsum('bhtd,bhsd->bhts', heads(q), heads(k)) + bias
    x = x + rearrange(jax.nn.softmax(scores) @ heads(v), 'b h t d -> b t (h d)') @ p['out']
    return rearrange(x, '(b w) t c -> b (w t) c', b=N).mean(1) @ p['head']

  shapes = {
    'embed': (3, 4),
    'scale': (4,),
    'shift': (4,),
    'qkv': (4, 12),
    'table': (9, 2),
    'out': (4, 4),
    'head': (4, 3),
  }
  return plain(network, normals(shapes), normal(N, 4, 4, 3))


class Generator(nn.Module):
  """DCGAN's: noise to images by transposed convolutions."""

  @nn.compact
  def __call__(self, z, train):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
    x = nn.relu(norm()(nn.Dense(2 * 2 * 6)(z).reshape(-1, 2, 2, 6)))
    x = nn.relu(norm()(nn.ConvTranspose(4, (4, 4), (2, 2))(x)))
    return nn.tanh(nn.ConvTranspose(1, (4, 4), (2, 2), padding='SAME')(x))


class Discriminator(nn.Module):
  """DCGAN's, with spectral norm on every layer."""

  @nn.compact
  def __call__(self, x):
    x = nn.leaky_relu(nn.SpectralNorm(nn.Conv(4, (4, 4), (2, 2)))(x, update_stats=False))
    x = nn.leaky_relu(nn.SpectralNorm(nn.Conv(6, (4, 4), (2, 2)))(x, update_stats=False))
    return nn.SpectralNorm(nn.Dense(1))(x.reshape(x.shape[0], -1), update_stats=False)


def discriminator():
  def hinge(logits, y):
    logits = kron.observe.bernoulli(logits)
    return jax.nn.relu(1 - y[:, None] * logits).mean()

  return linen(Discriminator(), normal(N, 8, 8, 1), jnp.where(labels(2) > 0, 1.0, -1.0), hinge)


def vae():
  def network(p, x, noise):
    mean, log_variance = jnp.split(jnp.tanh(x @ p['in'] + p['b']) @ p['code'], 2, -1)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    prior = 0.5 * (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(-1).mean()
    return jnp.tanh(z @ p['up']) @ p['out'], prior

  def loss(p, x, noise):
    out, prior = network(p, x, noise)
    return squared(out, x) + prior

  params = normals({'in': (6, 5), 'b': (5,), 'code': (5, 4), 'up': (2, 5), 'out': (5, 6)})
  return Case('plain', loss, params, (normal(N, 6), normal(N, 2, seed=2)))


def siamese():
  """Two branches of one network, and a learned temperature between them (as CLIP's)."""

  def embed(p, x):
    z = jnp.tanh(x @ p['first'] + p['bias']) @ p['second']
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

  def network(p, x):
    return jnp.exp(p['temperature']) * embed(p, x[:, 0]) @ embed(p, x[:, 1]).T

  params = normals({'first': (4, 5), 'bias': (5,), 'second': (5, 3), 'temperature': ()})
  return plain(network, params, normal(N, 2, 4), jnp.arange(N))


def weight_norm():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.tanh(nn.WeightNorm(nn.Dense(5))(x))
      return nn.WeightNorm(nn.Dense(3))(x)

  return linen(Net(), normal(N, 4))


# --- sequences -----------------------------------------------------------------------------------------------------

VOCABULARY, LENGTH = 11, 5


def tokens(seed=5, length=LENGTH):
  return integers(VOCABULARY, N, length, seed=seed)


def attention(q, k, v, mask=None):
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1])
  scores = scores if mask is None else jnp.where(mask, scores, -1e9)
  return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores), v)


def gpt():
  """Tied embeddings, layers stacked in a scan, each under remat."""
  causal = np.tril(np.ones((LENGTH, LENGTH), bool))

  def block(x, p):
    h = layer_norm(x, p['scale1'], p['shift1'])
    q, k, v = jnp.moveaxis(jnp.einsum('btc,cnhd->btnhd', h, p['qkv']), 2, 0)
    x = x + jnp.einsum('bthd,hdc->btc', attention(q, k, v, causal), p['out'])
    h = layer_norm(x, p['scale2'], p['shift2'])
    return x + jax.nn.gelu(h @ p['up'] + p['up_bias']) @ p['down'], None

  def network(p, x):
    h = p['embedding'][x] + p['positions'][jnp.arange(x.shape[1])]
    h, _ = jax.lax.scan(jax.checkpoint(block), h, p['layers'])
    return layer_norm(h, p['scale'], p['shift']) @ p['embedding'].T

  layers = {'scale1': (2, 4), 'shift1': (2, 4), 'qkv': (2, 4, 3, 2, 2), 'out': (2, 2, 2, 4), 'scale2': (2, 4),
            'shift2': (2, 4), 'up': (2, 4, 6), 'up_bias': (2, 6), 'down': (2, 6, 4)}  # fmt: skip
  shapes = {'embedding': (VOCABULARY, 4), 'positions': (6, 4), 'layers': layers, 'scale': (4,), 'shift': (4,)}
  return plain(network, normals(shapes), tokens(), tokens(6))


def t5():
  """Encoder and decoder by einsum, no biases, relative positions, RMS norms, one embedding for both."""

  def rms(x, scale):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

  def attend(p, x, context, bias):
    q = jnp.einsum('btc,chd->bthd', x, p['q'])
    k = jnp.einsum('bsc,chd->bshd', context, p['k'])
    v = jnp.einsum('bsc,chd->bshd', context, p['v'])
    scores = jnp.einsum('bthd,bshd->bhts', q, k) + bias
    return jnp.einsum('bthd,hdc->btc', jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores), v), p['o'])

  distance = np.clip(np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None], -2, 2) + 2

  def network(p, x):
    source, target = p['embedding'][x], p['embedding'][jnp.roll(x, 1, 1)]
    bias = p['relative'][distance].transpose(2, 0, 1)[None]
    h = rms(source, p['n1'])
    encoded = source + attend(p['self'], h, h, bias)
    wi = jax.nn.gelu(jnp.einsum('btc,cf->btf', encoded, p['gate'])) * jnp.einsum('btc,cf->btf', encoded, p['wi'])
    encoded = encoded + jnp.einsum('btf,fc->btc', wi, p['wo'])
    decoded = target + attend(p['cross'], rms(target, p['n2']), encoded, 0.0)
    return rms(decoded, p['n3']) @ p['head']

  heads = {'q': (4, 2, 3), 'k': (4, 2, 3), 'v': (4, 2, 3), 'o': (2, 3, 4)}
  shapes = {'embedding': (VOCABULARY, 4), 'relative': (5, 2), 'self': heads, 'cross': heads, 'n1': (4,), 'n2': (4,),
            'n3': (4,), 'gate': (4, 6), 'wi': (4, 6), 'wo': (6, 4), 'head': (4, VOCABULARY)}  # fmt: skip
  return plain(network, normals(shapes), tokens(), tokens(6))


def moe():
  """A mixture of experts with a softmax gate; a block for each expert."""

  def network(p, x):
    gate = jax.nn.softmax(x @ p['gate'])
    chosen = jnp.where(gate >= gate.max(-1, keepdims=True), gate, 0)
    sent = jnp.einsum('bti,bte->ebti', x, (chosen > 0).astype(x.dtype))
    h = jax.nn.relu(jnp.einsum('ebti,eif->ebtf', sent, p['up']) + p['bias'][:, None, None])
    y = jnp.einsum('ebtf,efo->ebto', h, p['down'])
    return jnp.einsum('ebto,bte->bo', y, chosen) @ p['head']

  shapes = {'gate': (4, 3), 'up': (3, 4, 5), 'bias': (3, 5), 'down': (3, 5, 4), 'head': (4, 3)}
  return plain(network, normals(shapes), normal(N, LENGTH, 4))


class Recurrent(nn.Module):
  cell: Any
  both: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Embed(VOCABULARY, 3)(x)
    rnn = nn.RNN(self.cell(4))
    x = nn.Bidirectional(rnn, nn.RNN(self.cell(4)))(x) if self.both else rnn(x)
    return nn.Dense(3)(x.mean(1))


def haiku_gru():
  def forward(x):
    out, _ = hk.dynamic_unroll(hk.GRU(4), x, hk.GRU(4).initial_state(N), time_major=False)
    return hk.Linear(3)(out[:, -1])

  net, x = hk.without_apply_rng(hk.transform(forward)), normal(N, LENGTH, 3)
  return plain(net.apply, jittered(jax.jit(net.init)(KEY, x)), x)._replace(framework='haiku')


class WaveNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.Embed(VOCABULARY, 4)(x)
    skips = 0.0
    for k in range(3):
      conv = functools.partial(nn.Conv, 4, (2,), kernel_dilation=2**k, padding='CAUSAL')
      gated = nn.tanh(conv()(h)) * nn.sigmoid(conv()(h))
      skips += nn.Dense(5)(gated)
      h = h + nn.Dense(4)(gated) if k < 2 else h
    return nn.Dense(VOCABULARY)(nn.relu(skips))


def lora():
  """Low-rank updates of a frozen network."""

  def network(p, x):
    frozen = jax.lax.stop_gradient(p['frozen'])
    h = jnp.tanh(x @ frozen['w'] + (x @ p['a1']) @ p['b1'])
    return h @ frozen['v'] + (h @ p['a2']) @ p['b2']

  shapes = {'frozen': {'w': (4, 5), 'v': (5, 3)}, 'a1': (4, 2), 'b1': (2, 5), 'a2': (5, 2), 'b2': (2, 3)}
  return plain(network, normals(shapes), normal(N, 4))


def state_space():
  """A diagonal state-space layer (S4D): decay rates through an exponential, over time in a scan."""

  def network(p, x):
    decay = jnp.exp(-jnp.exp(p['log_rate']))
    u = x @ p['in']

    def step(h, u):
      h = decay * h + u
      return h, h

    _, hs = jax.lax.scan(step, jnp.zeros_like(u[:, 0]), u.swapaxes(0, 1))
    return jax.nn.gelu(hs.swapaxes(0, 1) + p['skip'] * u).mean(1) @ p['out']

  return plain(network, normals({'in': (3, 4), 'log_rate': (4,), 'skip': (4,), 'out': (4, 3)}), normal(N, LENGTH, 3))


# --- science and graphs --------------------------------------------------------------------------------------------


def gcn():
  """Graph convolutions by segment sums; every node is an example."""
  senders, receivers = np.array([0, 1, 2, 3, 4, 5, 6, 0, 2]), np.array([1, 2, 3, 4, 5, 6, 0, 3, 5])

  def spread(h):
    return h + jax.ops.segment_sum(h[senders], receivers, N)

  def network(p, x):
    h = jax.nn.relu(spread(x @ p['w1']) + p['b1'])
    return spread(h @ p['w2']) + p['b2']

  return plain(network, normals({'w1': (4, 5), 'b1': (5,), 'w2': (5, 3), 'b2': (3,)}), normal(N, 4))


def deep_sets():
  def network(p, x):
    h = jax.nn.relu(jax.vmap(jax.vmap(lambda x: x @ p['w1'] + p['b1']))(x))
    return h.max(1) @ p['w2'] + p['b2']

  return plain(network, normals({'w1': (3, 5), 'b1': (5,), 'w2': (5, 3), 'b2': (3,)}), normal(N, LENGTH, 3))


def pinn():
  """A SIREN that solves a heat equation: the loss differentiates the network twice."""

  def u(p, x):
    h = jnp.sin(3 * (x @ p['w1'] + p['b1']))
    return (jnp.sin(h @ p['w2'] + p['b2']) @ p['w3'])[0]

  def residual(p, x):
    first = jax.grad(u, 1)(p, x)
    second = jax.jvp(lambda x: jax.grad(u, 1)(p, x), (x,), (jnp.array([1.0, 0.0]),))[1]
    return first[1] - second[0]

  def loss(p, x, y):
    inside = squared(jax.vmap(residual, (None, 0))(p, x)[:, None], 0.0)
    return inside + squared(jax.vmap(u, (None, 0))(p, y)[:, None], jnp.sin(y[:, :1]))

  shapes = {'w1': (2, 5), 'b1': (5,), 'w2': (5, 4), 'b2': (4,), 'w3': (4, 1)}
  return Case('plain', loss, normals(shapes), (normal(N, 2), normal(N, 2, seed=2)))


def ferminet():
  """log|psi| of two electrons by complex orbitals and a determinant."""

  def log_psi(p, x):
    h = jnp.tanh(x @ p['w1'] + p['b1'])
    h = jnp.tanh(jnp.concatenate([h, jnp.broadcast_to(h.mean(-2, keepdims=True), h.shape)], -1) @ p['w2'])
    orbitals = (h + 1j * h**2) @ p['orbitals'].astype(jnp.complex64)
    psi = orbitals[0, 0] * orbitals[1, 1] - orbitals[0, 1] * orbitals[1, 0]
    return jnp.log(jnp.abs(psi))

  def network(p, x):
    return jax.vmap(log_psi, (None, 0))(p, x)[:, None]

  params = normals({'w1': (3, 4), 'b1': (4,), 'w2': (8, 5), 'orbitals': (5, 2)})
  return plain(network, params, normal(N, 2, 3), 0.3, squared)


def neural_ode():
  """Four Runge-Kutta steps of a learned field, in a fori_loop."""

  def network(p, x):
    field = lambda x: jnp.tanh(x @ p['w'] + p['b']) @ p['v']  # noqa: E731

    def step(_, x):
      k1 = field(x)
      k2 = field(x + 0.05 * k1)
      return x + 0.1 * k2

    return jax.lax.fori_loop(0, 4, step, x) @ p['out']

  return plain(network, normals({'w': (4, 5), 'b': (5,), 'v': (5, 4), 'out': (4, 3)}), normal(N, 4))


def hypernetwork():
  """A network whose weights another one makes: refused, the weights are computed."""

  def network(p, x):
    made = jnp.tanh(p['code'] @ p['maker']).reshape(4, 3)
    return x @ made + p['b']

  return plain(network, normals({'code': (2,), 'maker': (2, 12), 'b': (3,)}), normal(N, 4))


def pruned():
  """Kernels of which some entries stay zero: masks of numpy and JAX, numbers and booleans, multiplied or chosen by."""
  masks = {k: np.random.default_rng(i).random(s) < 0.6 for i, (k, s) in enumerate(PRUNED.items())}

  def network(p, x):
    x = jnp.tanh(x @ (p['a'] * masks['a'].astype(np.float32)))
    x = jnp.tanh(x @ (p['b'] * jnp.asarray(masks['b'])))
    x = jnp.tanh(x @ jnp.where(masks['c'], p['c'], 0.0))
    return x @ (p['d'] * jnp.asarray(masks['d'], jnp.float32))

  return plain(network, normals(PRUNED), normal(N, 4))


PRUNED = {'a': (4, 6), 'b': (6, 5), 'c': (5, 6), 'd': (6, 3)}


GALLERY: dict[str, Callable[[], Case]] = {
  'MLP': mlp,
  'deep autoencoder': autoencoder,
  'ResNet': resnet,
  'CNN in haiku': haiku_cnn,
  'CNN in equinox': equinox_cnn,
  'CNN in nnx': nnx_cnn,
  'ConvNeXt': lambda: linen(ConvNeXt(), normal(N, 6, 6, 3)),
  'MobileNet with squeeze and excite': lambda: linen(MobileNet(), normal(N, 6, 6, 3), train=True),
  'U-Net': unet,
  '3-D ResNet': lambda: linen(ResNet3D(), normal(N, 3, 4, 4, 2)),
  'R(2+1)D': lambda: linen(ResNet3D(factorised=True), normal(N, 3, 4, 4, 2)),
  'ViT': lambda: linen(ViT(), normal(N, 4, 4, 3)),
  'video transformer': lambda: linen(VideoTransformer(), normal(N, 4, 4, 4, 2)),
  'Mixer': lambda: linen(Mixer(), normal(N, 4, 4, 3)),
  'Swin': swin,
  'DCGAN generator': lambda: linen(Generator(), normal(N, 4), None, lambda z, y: squared(z), train=True),
  'DCGAN discriminator, spectral norm': discriminator,
  'VAE': vae,
  'siamese, learned temperature': siamese,
  'weight norm': weight_norm,
  'GPT, tied, scan over layers, remat': gpt,
  'T5': t5,
  'mixture of experts': moe,
  'LSTM': lambda: linen(Recurrent(nn.OptimizedLSTMCell), tokens()),
  'LSTM, both ways': lambda: linen(Recurrent(nn.LSTMCell, both=True), tokens()),
  'GRU': lambda: linen(Recurrent(nn.GRUCell), tokens()),
  'GRU in haiku': haiku_gru,
  'WaveNet': lambda: linen(WaveNet(), tokens(), tokens(6)),
  'LoRA': lora,
  'pruned kernels': pruned,
  'state-space layer': state_space,
  'GCN': gcn,
  'deep sets': deep_sets,
  'SIREN as a PINN': pinn,
  'FermiNet': ferminet,
  'neural ODE': neural_ode,
  'hypernetwork': hypernetwork,
}
