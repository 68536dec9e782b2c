"""Layers of random programs that write common things in uncommon ways."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.kron.random_layers import ACTIVATIONS, Layer, product


def late_bias(draw, d, lead):
  """A bias that is not added right after its kernel, but after what comes in between."""
  draw.note('late bias')
  o = draw.pick(3, 4)
  how = draw.pick('moved', 'constant', 'activation', 'twice', 'minus', 'masked', 'rolled', *['mean'] * (lead == 'nt'))
  spec = f'{lead}i,io->{lead}o'
  keep = draw.rng.random(o) < 0.7

  def apply(ctx, p, x):
    y, arrange = product(ctx, spec, x, p['w'])
    if how == 'moved':
      b = ctx.layout(lambda b: b.reshape(o, *[1] * len(lead)), p['b'])
      y = jnp.moveaxis(y, -1, 0)
      y = ctx.bias(y, b, lambda a: arrange(np.moveaxis(np.asarray(a), 0, -1)), 1)
      return jnp.moveaxis(y, 0, -1)
    if how == 'minus':
      return y - ctx.free(p['b'], y, shift=True)
    if how == 'twice':
      y = jnp.tanh(y + ctx.free(p['b'], y)) if draw_first else y
      return y * 0.5 + ctx.free(p['b'], y)
    if how == 'masked':
      return y + jnp.where(keep, ctx.free(p['b'], y), 0.0)
    between = {
      'constant': lambda y: 3.0 * y, 'activation': jnp.sin, 'rolled': lambda y: jnp.roll(y, 1, -1),
      'mean': lambda y: jnp.broadcast_to(y.mean(1, keepdims=True), y.shape),
    }[how]  # fmt: skip
    y = between(y)
    return y + ctx.free(p['b'], y)

  draw_first = draw.flip()
  return Layer({'w': (d, o), 'b': (o,)}, apply, o, lead)


def gates(draw, d, lead):
  """Two products of the same input, one of them a gate; or one product cut into both."""
  draw.note('gates')
  o, cut, biased = 3, draw.flip(), draw.flip()
  spec = f'{lead}i,io->{lead}o'

  def apply(ctx, p, x):
    if not cut:
      return jax.nn.sigmoid(product(ctx, spec, x, p['v'])[0]) * product(ctx, spec, x, p['w'])[0]
    y, arrange = product(ctx, spec, x, p['w'])
    y = ctx.bias(y, p['b'], arrange) if biased else y
    gate, y = jnp.split(y, 2, -1)
    return jax.nn.sigmoid(gate) * y

  shapes = {'w': (d, 2 * o)} | ({'b': (2 * o,)} if biased else {}) if cut else {'v': (d, o), 'w': (d, o)}
  return Layer(shapes, apply, o, lead)


def attention(draw, d, lead):
  """Attention with heads, its three kernels apart or in one."""
  draw.note('attention')
  h, k, joint = 2, draw.pick(1, 2), draw.flip()

  def apply(ctx, p, x):
    lead = 'nt' if x.ndim == 3 else 't'
    if joint:
      q, key, v = jnp.moveaxis(product(ctx, f'{lead}i,iqhk->{lead}qhk', x, p['qkv'])[0], -3, 0)
    else:
      q, key, v = (product(ctx, f'{lead}i,ihk->{lead}hk', x, p[name])[0] for name in 'qkv')
    weights = jax.nn.softmax(jnp.einsum('...thk,...shk->...hts', q, key), -1)
    y = jnp.einsum('...hts,...shk->...thk', weights, v)
    return product(ctx, f'{lead}hk,hko->{lead}o', y, p['out'])[0]

  shapes = {'qkv': (d, 3, h, k)} if joint else {name: (d, h, k) for name in 'qkv'}
  return Layer(shapes | {'out': (h, k, d)}, apply, d, lead)


def beside(draw, d, lead):
  """A class token before the places, or learned positions added to them."""
  draw.note('free')
  token = draw.flip()
  if token:
    draw.sizes['t'] += 1
    shape = draw.pick((d,), (1, d))
  else:
    shape = (draw.sizes['t'], d)

  def apply(ctx, p, x):
    if not token:
      return x + ctx.free(p['at'], x, shift=True)
    first = jnp.broadcast_to(ctx.free(p['at'], x), (*x.shape[:-2], 1, d))
    return jnp.concatenate([first, x], -2)

  return Layer({'at': shape}, apply, d, lead)


def scaled(draw, d, lead):
  """A scale written otherwise."""
  draw.note('scale')
  how = draw.pick('one more', 'divided', 'shift first', 'twice', 'reshaped', 'masked', 'constant', 'square')
  keep = draw.rng.random(d) < 0.7
  constant = 1 + draw.rng.random(d)

  def apply(ctx, p, x):
    if how == 'reshaped':
      return x * ctx.free(ctx.layout(lambda s: s.reshape(-1), p['s']), x)
    s = ctx.free(p['s'], x)
    if how == 'one more':
      return x * (1 + s)
    if how == 'divided':
      return x / (2 + s)
    if how == 'shift first':
      return (x + ctx.free(p['b'], x, shift=True)) * s
    if how == 'twice':
      x = jnp.tanh(x * s)
      return x * ctx.free(p['s'], x) + ctx.free(p['b'], x)
    if how == 'masked':
      return jnp.where(keep, x * s, x)
    return x * (constant * s) if how == 'constant' else x * s**2

  shapes = {'s': (1, d) if how == 'reshaped' else (d,)} | ({'b': (d,)} if how in ('shift first', 'twice') else {})
  return Layer(shapes, apply, d, lead)


def repeated_kernel(draw, d, lead):
  """A kernel repeated for every example before a batched product."""
  draw.note('repeated kernel')
  o = draw.pick(3, 4)
  before, after = (f'{lead}i', f'{lead}o')

  def apply(ctx, p, x):
    if ctx.unrolled:
      return product(ctx, f'{before},io->{after}', x, p['w'])[0]
    w = jnp.broadcast_to(p['w'], (x.shape[0], d, o))
    return jnp.einsum(f'{before},{lead[0]}io->{after}', x, w)

  return Layer({'w': (d, o)}, apply, o, lead)


def siamese(draw, d, lead):
  """A kernel met by two inputs, one after the other or as one longer batch."""
  draw.note('siamese')
  o, joined = draw.pick(3, 4), draw.flip()
  biased, act = draw.flip(), ACTIVATIONS[draw.pick(*ACTIVATIONS)]
  spec = f'{lead}i,io->{lead}o'

  def layer(ctx, p, x):
    y, arrange = product(ctx, spec, x, p['w'])
    return act(ctx.bias(y, p['b'], arrange) if biased else y)

  def apply(ctx, p, x):
    if joined:
      y = layer(ctx, p, jnp.concatenate([x, jnp.cos(x)]))
      return y[: len(x)] * y[len(x) :]
    return layer(ctx, p, x) - layer(ctx, p, jnp.cos(x))

  return Layer({'w': (d, o)} | ({'b': (o,)} if biased else {}), apply, o, lead)


def half_biased(draw, d, lead):
  """A kernel used twice, of which only one use adds the bias."""
  draw.note('used twice')
  first = draw.flip()
  spec = f'{lead}i,io->{lead}o'

  def apply(ctx, p, x):
    for k in range(2):
      x, arrange = product(ctx, spec, x, p['w'])
      x = jnp.tanh(ctx.bias(x, p['b'], arrange) if (k == 0) == first else x)
    return x

  return Layer({'w': (d, d), 'b': (d,)}, apply, d, lead)


def two_biases(draw, d, lead):
  """Two biases on one kernel, or one bias on two kernels."""
  draw.note('shared bias')
  one = draw.flip()
  spec = f'{lead}i,io->{lead}o'

  def apply(ctx, p, x):
    y, arrange = product(ctx, spec, x, p['w'])
    if not one:
      y = ctx.bias(y, p['b'], arrange)
      return y + ctx.free(p['c'], y)
    y = jnp.tanh(ctx.bias(y, p['b'], arrange))
    z, arrange = product(ctx, spec, jnp.sin(x), p['v'])
    return y + ctx.bias(z, p['b'], arrange)

  return Layer({'w': (d, 3), 'b': (3,), **({'v': (d, 3)} if one else {'c': (3,)})}, apply, 3, lead)


def routed(draw, d, lead):
  """Examples in another order, some twice and some not at all, by indices of the batch."""
  draw.note('routed')
  index = draw.arg(draw.rng.integers(0, draw.sizes['n'], draw.sizes['n']))
  draw.closed = True
  return Layer({}, lambda ctx, p, x: x[ctx.args[index]], d, lead)


def learned_state(draw, d, lead):
  """A recurrent layer that starts from a learned state."""
  draw.note('scan over time')
  draw.note('free')

  def apply(ctx, p, x):
    def step(h, x):
      y, arrange = product(ctx, 'ni,io->no', h, p['u'])
      return jnp.tanh(x + ctx.bias(y, p['b'], arrange)), None

    start = jnp.broadcast_to(ctx.free(p['start'], x[:, 0]), x[:, 0].shape)
    return ctx.scan(step, start, x.swapaxes(0, 1))[0]

  return Layer({'u': (d, d), 'b': (d,), 'start': (d,)}, apply, d, 'n')


def tied_decoder(draw, d, lead):
  """Products with a table and with its transpose, as of a language model; tokens are the batch's."""
  draw.note('embedding')
  draw.note('tied')
  v = 5
  index = draw.arg(draw.rng.integers(0, v, [draw.sizes[c] for c in lead]))
  draw.closed = True

  def apply(ctx, p, x):
    tokens = ctx.args[index]
    y = ctx.value(p['t'])[tokens]
    if ctx.unrolled:
      hot = jax.nn.one_hot(tokens, v, dtype=jnp.float64)
      y = ctx.linear(y, hot.reshape(1, -1, v), p['t'].ids[None], lambda a: a.reshape(1, -1, d))
    return product(ctx, f'{lead}i,vi->{lead}v', jnp.tanh(x + y), p['t'])[0]

  return Layer({'t': (v, d)}, apply, v, lead)


def weight_norm(draw, d, lead):
  """A kernel over the norm of its columns: the norm is held constant, as the documentation says."""
  draw.note('normed kernel')
  whole = draw.flip()

  def apply(ctx, p, x):
    value = ctx.value(p['w'])
    by = 1 / jnp.sqrt((value**2).sum(None if whole else 0, keepdims=True) + 0.1)
    kernel = ctx.effective(p['w'], lambda w: w * jax.lax.stop_gradient(by))
    return product(ctx, f'{lead}i,io->{lead}o', x, kernel, coefficient=('rows' if whole else 'columns', by))[0]

  return Layer({'w': (d, 4)}, apply, 4, lead)


def picked_kernels(draw, d, lead):
  """Every example has the kernel of its own class."""
  draw.note('picked kernels')
  e, o = 3, draw.pick(2, 3)
  index = draw.arg(draw.rng.integers(0, e, draw.sizes['n']))
  draw.closed = True

  def apply(ctx, p, x):
    classes = ctx.args[index]
    w = ctx.value(p['w'])[classes]
    if ctx.unrolled:
      hot = jax.nn.one_hot(classes, e, dtype=jnp.float64)
      w = ctx.linear(w, hot[None], p['w'].ids.reshape(1, e, -1), lambda a: a.reshape(1, -1, d * o))
    return jnp.einsum(f'{lead}i,nio->{lead}o', x, w)

  return Layer({'w': (e, d, o)}, apply, o, lead)


def chosen_kernel(draw, d, lead):
  """All examples have the kernel of one class, which a number of the batch tells."""
  draw.note('chosen kernel')
  index = draw.arg(np.int32(draw.pick(0, 1)))  # kron refuses it

  def apply(ctx, p, x):
    if ctx.unrolled:
      w = ctx.layout(lambda w: w[int(ctx.args[index])], p['w'])
      return product(ctx, f'{lead}i,io->{lead}o', x, w)[0]
    return x @ p['w'][ctx.args[index]]

  return Layer({'w': (2, d, 3)}, apply, 3, lead)


ANYWHERE = (late_bias, late_bias, gates, scaled, scaled, half_biased, two_biases, weight_norm)
OF_BATCHES = (repeated_kernel, siamese)
