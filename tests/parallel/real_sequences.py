"""Builds networks for text, sound, points and equations at real sizes. `SEQUENCES`: name -> function -> `Case`."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tests.parallel.real_cases import (
  Case,
  attention,
  causal,
  cross_entropy,
  f32,
  i32,
  layer_norm,
  linen,
  plain,
  rms_norm,
  squared,
  structs,
)

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 32_000, 512, 8, 12, 256
TOKENS = i32(LENGTH)
QKVO = {name: (WIDTH, HEADS, WIDTH // HEADS) for name in 'qkv'} | {'o': (HEADS, WIDTH // HEADS, WIDTH)}


def gpt():
  """Returns the case of a decoder with tied embeddings and twelve layers in a scan, each under remat."""
  mask = causal(LENGTH)

  def block(x, p):
    h = layer_norm(x, p['scale1'], p['shift1'])
    q, k, v = jnp.moveaxis(jnp.einsum('btc,cnhd->btnhd', h, p['qkv']), 2, 0)
    x = x + jnp.einsum('bthd,hdc->btc', attention(q, k, v, mask), p['out'])
    h = layer_norm(x, p['scale2'], p['shift2'])
    return x + jax.nn.gelu(h @ p['up'] + p['up_bias']) @ p['down'], None

  def network(p, x):
    h = p['embedding'][x] + p['positions'][jnp.arange(x.shape[1])]
    h, _ = jax.lax.scan(jax.checkpoint(block), h, p['layers'])
    return layer_norm(h, p['scale'], p['shift']) @ p['embedding'].T

  c = WIDTH
  layer = {'scale1': (c,), 'shift1': (c,), 'qkv': (c, 3, HEADS, c // HEADS), 'out': (HEADS, c // HEADS, c),
           'scale2': (c,), 'shift2': (c,), 'up': (c, 4 * c), 'up_bias': (4 * c,), 'down': (4 * c, c)}  # fmt: skip
  layers = {name: (LAYERS, *shape) for name, shape in layer.items()}
  shapes = {'embedding': (VOCABULARY, c), 'positions': (LENGTH, c), 'layers': layers, 'scale': (c,), 'shift': (c,)}
  return plain(network, shapes, TOKENS, target=TOKENS, each=8)


def attend(p, x, context, bias):
  """Applies attention with T5's einsums, which have no biases."""
  project = lambda name, x: jnp.einsum('btc,chd->bthd', x, p[name])  # noqa: E731
  y = attention(project('q', x), project('k', context), project('v', context), bias)
  return jnp.einsum('bthd,hdc->btc', y, p['o'])


def t5(layers=4):
  """Returns the case of an encoder and a decoder with relative positions, gated units and one embedding."""
  distance = np.clip(np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None], -15, 16) + 15

  def gated(p, x):
    h = rms_norm(x, p['norm'])
    wide = jax.nn.gelu(jnp.einsum('btc,cf->btf', h, p['gate'])) * jnp.einsum('btc,cf->btf', h, p['up'])
    return x + jnp.einsum('btf,fc->btc', wide, p['down'])

  def network(p, x):
    source, target = p['embedding'][x], p['embedding'][jnp.roll(x, 1, 1)]
    bias = p['relative'][distance].transpose(2, 0, 1)[None]
    for own in p['encoder']:
      h = rms_norm(source, own['norm'])
      source = gated(own['gated'], source + attend(own['self'], h, h, bias))
    for own in p['decoder']:
      h = rms_norm(target, own['norm'])
      target = target + attend(own['self'], h, h, bias + causal(LENGTH))
      target = target + attend(own['cross'], rms_norm(target, own['norm_cross']), source, 0.0)
      target = gated(own['gated'], target)
    return rms_norm(target, p['norm']) @ p['head']

  c = WIDTH
  wide = {'gate': (c, 2 * c), 'up': (c, 2 * c), 'down': (2 * c, c), 'norm': (c,)}
  encoder = {'self': QKVO, 'norm': (c,), 'gated': wide}
  decoder = encoder | {'cross': QKVO, 'norm_cross': (c,)}
  shapes = {'embedding': (VOCABULARY, c), 'relative': (32, HEADS), 'norm': (c,), 'head': (c, VOCABULARY)}
  shapes |= {'encoder': [encoder] * layers, 'decoder': [decoder] * layers}
  return plain(network, shapes, TOKENS, target=TOKENS, each=8)


def moe(experts=8, capacity=64):
  """Returns the case of a Switch layer: an expert takes up to `capacity` tokens of each example."""

  def network(p, x):
    gate = jax.nn.softmax(x @ p['gate'])
    chosen = jax.nn.one_hot(gate.argmax(-1), experts)
    place = jnp.cumsum(chosen, 1) * chosen - 1
    sent = jax.nn.one_hot(place.astype(jnp.int32), capacity) * chosen[..., None]  # b t e c
    h = jax.nn.relu(jnp.einsum('btec,bti->ebci', sent, x) @ p['up'][:, None] + p['bias'][:, None, None])
    y = jnp.einsum('ebcf,efo->ebco', h, p['down'])
    return (x + jnp.einsum('btec,ebco,bte->bto', sent, y, gate)).mean(1) @ p['head']

  c = WIDTH
  shapes = {'gate': (c, experts), 'up': (experts, c, 4 * c), 'bias': (experts, 4 * c), 'down': (experts, 4 * c, c),
            'head': (c, 1000)}  # fmt: skip
  return plain(network, shapes, f32(LENGTH, c))


class Recurrent(nn.Module):
  """Predicts tokens by 512 units in one direction or both."""

  cell: Any
  both: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Embed(10_000, 512)(x)
    rnn = nn.RNN(self.cell(512))
    x = nn.Bidirectional(rnn, nn.RNN(self.cell(512)))(x) if self.both else rnn(x)
    return nn.Dense(10_000)(x)


def recurrent(cell, both=False):
  return linen(Recurrent(cell, both), i32(64), target=i32(64))


def haiku_gru():
  """Returns the case of a GRU in haiku."""

  def forward(x):
    core = hk.GRU(512)
    out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(128)(out[:, -1])

  net = hk.without_apply_rng(hk.transform(forward))
  params = jax.eval_shape(net.init, jax.random.key(0), f32(1, 64, 128))
  loss = lambda params, state, batch, key: cross_entropy(net.apply(params, batch[0]), batch[1])  # noqa: E731
  return Case(loss, params, {}, (f32(64, 128), i32()))


class WaveNet(nn.Module):
  """Predicts sound of 256 levels by convolutions of dilation 1 to 512."""

  @nn.compact
  def __call__(self, x):
    h = nn.Embed(256, 64)(x)
    skips = 0.0
    for k in range(10):
      dilated = functools.partial(nn.Conv, 64, (2,), kernel_dilation=2**k, padding='CAUSAL')
      gated = nn.tanh(dilated()(h)) * nn.sigmoid(dilated()(h))
      skips += nn.Dense(128)(gated)
      h = h + nn.Dense(64)(gated) if k < 9 else h
    return nn.Dense(256)(nn.relu(nn.Dense(256)(nn.relu(skips))))


def lora(rank=8):
  """Returns the case of low-rank updates of four frozen layers."""

  def network(p, x):
    for own in p:
      frozen = jax.lax.stop_gradient(own['frozen'])
      x = jnp.tanh(x @ frozen + (x @ own['down']) @ own['up'])
    return x

  layer = {'frozen': (1024, 1024), 'down': (1024, rank), 'up': (rank, 1024)}
  return plain(network, [layer] * 4, f32(LENGTH, 1024), target=i32(LENGTH))


def state_space():
  """Returns the case of four diagonal state-space layers over 1,024 steps."""

  def network(p, x):
    for own in p['layers']:
      decay, u = jnp.exp(-jnp.exp(own['log_rate'])), x @ own['in']

      def step(h, u, decay=decay):
        h = decay * h + u
        return h, h

      _, hs = jax.lax.scan(step, jnp.zeros_like(u[:, 0]), u.swapaxes(0, 1))
      x = jax.nn.gelu(hs.swapaxes(0, 1) + own['skip'] * u)
    return x.mean(1) @ p['out']

  layer = {'in': (256, 256), 'log_rate': (256,), 'skip': (256,)}
  return plain(network, {'layers': [layer] * 4, 'out': (256, 10)}, f32(1024, 256))


# --- points, pairs, equations


def mlp():
  """Returns the case of a multi-layer perceptron."""

  def network(p, x):
    for kernel, bias in p[:-1]:
      x = jnp.tanh(x @ kernel + bias)
    return x @ p[-1][0] + p[-1][1]

  widths = (784, 1024, 1024, 1024, 10)
  shapes = [[(a, b), (b,)] for a, b in itertools.pairwise(widths)]
  return plain(network, shapes, f32(784))


def vae():
  """Returns the case of a variational autoencoder of digits."""

  def loss(p, state, batch, key):
    del state, key
    x, noise = batch
    mean, log_variance = jnp.split(jnp.tanh(jnp.tanh(x @ p['in'] + p['b']) @ p['mid']) @ p['code'], 2, -1)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    prior = 0.5 * (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(-1).mean()
    return squared(jnp.tanh(jnp.tanh(z @ p['up']) @ p['mid_up']) @ p['out'], x) + prior

  shapes = {'in': (784, 1024), 'b': (1024,), 'mid': (1024, 512), 'code': (512, 128), 'up': (64, 512),
            'mid_up': (512, 1024), 'out': (1024, 784)}  # fmt: skip
  return Case(loss, structs(shapes), {}, (f32(784), f32(64)))


def siamese():
  """Returns the case of CLIP's loss, which tells each example of the batch from all the others."""

  def embed(p, x):
    z = jax.nn.relu(x @ p['first'] + p['bias']) @ p['second']
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

  def loss(p, state, batch, key):
    del state, key
    (x,) = batch
    logits = jnp.exp(p['temperature']) * embed(p, x[:, 0]) @ embed(p, x[:, 1]).T
    return cross_entropy(logits, jnp.arange(x.shape[0]))

  shapes = {'first': (1024, 2048), 'bias': (2048,), 'second': (2048, 256), 'temperature': ()}
  return Case(loss, structs(shapes), {}, (f32(2, 1024),))


def verified():
  """Returns the case of a convolutional network that tells whether two images are alike."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = rearrange(x, 'b two ... -> (b two) ...')
      for c in (64, 128, 128, 256):
        x = nn.max_pool(nn.relu(nn.Conv(c, (3, 3))(x)), (2, 2), (2, 2))
      z = rearrange(nn.Dense(256)(x.mean((1, 2))), '(b two) c -> b two c', two=2)
      return nn.Dense(2)(jnp.abs(z[:, 0] - z[:, 1]))

  return linen(Net(), f32(2, 105, 105, 1))


def deep_sets():
  """Returns the case of a network of sets of 1,024 points."""

  def network(p, x):
    h = jax.vmap(jax.vmap(lambda x: jax.nn.relu(jax.nn.relu(x @ p['w1'] + p['b1']) @ p['w2'] + p['b2'])))(x)
    return h.max(1) @ p['w3'] + p['b3']

  shapes = {'w1': (3, 256), 'b1': (256,), 'w2': (256, 1024), 'b2': (1024,), 'w3': (1024, 40), 'b3': (40,)}
  return plain(network, shapes, f32(1024, 3))


def gcn(edges=8):
  """Returns the case of graph convolutions, of graphs with 32 nodes and `edges` edges a node."""

  def spread(h, senders, receivers):
    along = jnp.take_along_axis(h, senders[..., None], 1)
    return h + jax.vmap(lambda x, to: jax.ops.segment_sum(x, to, 32))(along, receivers)

  def network(p, x, senders, receivers):
    h = jax.nn.relu(spread(x @ p['w1'], senders, receivers) + p['b1'])
    return spread(h @ p['w2'], senders, receivers) + p['b2']

  shapes = {'w1': (128, 256), 'b1': (256,), 'w2': (256, 128), 'b2': (128,)}
  return plain(network, shapes, f32(32, 128), i32(32 * edges), i32(32 * edges), target=i32(32))


def pinn():
  """Returns the case of a SIREN for the heat equation, whose loss differentiates the network twice."""

  def u(p, x):
    for kernel, bias in p[:-1]:
      x = jnp.sin(30 * (x @ kernel + bias))
    return (x @ p[-1][0] + p[-1][1])[0]

  def residual(p, x):
    first = jax.grad(u, 1)(p, x)
    second = jax.jvp(lambda x: jax.grad(u, 1)(p, x), (x,), (jnp.array([1.0, 0.0]),))[1]
    return first[1] - second[0]

  def loss(p, state, batch, key):
    del state, key
    inside, edge = batch
    known = squared(jax.vmap(u, (None, 0))(p, edge)[:, None], jnp.sin(edge[:, :1]))
    found = jax.vmap(residual, (None, 0))(p, inside)[:, None]
    return squared(found, jnp.zeros_like(found)) + known

  widths = (2, *(256,) * 5, 1)
  shapes = [[(a, b), (b,)] for a, b in itertools.pairwise(widths)]
  return Case(loss, structs(shapes), {}, (f32(2), f32(2)), 1024)


def ferminet(electrons=2, width=256):
  """Returns the case of log|psi| by complex orbitals and a determinant."""

  def log_psi(p, x):
    h = jnp.tanh(x @ p['w1'] + p['b1'])
    mean = lambda h: jnp.broadcast_to(h.mean(-2, keepdims=True), h.shape)  # noqa: E731
    h = jnp.tanh(jnp.concatenate([h, mean(h)], -1) @ p['w2'])
    orbitals = (h + 1j * h**2) @ p['orbitals'].astype(jnp.complex64)
    psi = orbitals[0, 0] * orbitals[1, 1] - orbitals[0, 1] * orbitals[1, 0]
    return jnp.log(jnp.abs(psi))

  def network(p, x):
    return jax.vmap(log_psi, (None, 0))(p, x)[:, None]

  shapes = {'w1': (3, width), 'b1': (width,), 'w2': (2 * width, width), 'orbitals': (width, 2)}
  return plain(network, shapes, f32(electrons, 3), target=f32(1), objective=squared, each=1024)


def neural_ode():
  """Returns the case of a learned field, integrated by twenty steps of Runge and Kutta's method."""

  def network(p, x):
    field = lambda x: jnp.tanh(x @ p['w'] + p['b']) @ p['v']  # noqa: E731

    def step(_, x):
      k1 = field(x)
      k2 = field(x + 0.025 * k1)
      k3 = field(x + 0.025 * k2)
      return x + 0.05 / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + 0.05 * k3))

    return jax.lax.fori_loop(0, 20, step, x) @ p['out']

  return plain(network, {'w': (128, 512), 'b': (512,), 'v': (512, 128), 'out': (128, 10)}, f32(128))


SEQUENCES: dict[str, Callable[[], Case]] = {
  'GPT, tied, scan over layers, remat': gpt,
  'T5': t5,
  'mixture of experts': moe,
  'LSTM': lambda: recurrent(nn.OptimizedLSTMCell),
  'LSTM, both ways': lambda: recurrent(nn.LSTMCell, both=True),
  'GRU': lambda: recurrent(nn.GRUCell),
  'GRU in haiku': haiku_gru,
  'WaveNet': lambda: linen(WaveNet(), i32(2048), target=i32(2048), each=8),
  'LoRA': lora,
  'state-space layers': state_space,
  'MLP': mlp,
  'VAE': vae,
  'siamese, all pairs, learned temperature': siamese,
  'siamese, pairs of images': verified,
  'deep sets': deep_sets,
  'GCN': gcn,
  'SIREN as a PINN': pinn,
  'FermiNet': ferminet,
  'neural ODE': neural_ode,
}
