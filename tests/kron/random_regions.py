"""Layers of random programs that hold others: loops, branches, nested calls, shared kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.kron import random_tricks
from tests.kron.random_layers import ACTIVATIONS, Layer, activation, convolution, dense, experts, free, product


def chain(layers, d, lead):
  def apply(ctx, p, x):
    for layer, own in zip(layers, p, strict=True):
      x = layer.apply(ctx, own, x)
    return x

  last = layers[-1] if layers else Layer((), None, d, lead)
  return Layer([layer.shapes for layer in layers], apply, last.d, last.lead)


def level(draw, d, lead):
  """One layer whose result has the same features: with parameters that a loop may slice."""
  layers = [dense(draw, d, lead, out=d, plain=draw.flip(0.7))]
  if draw.flip(0.3):
    layers.append(free(draw, d, lead))
  layers.append(activation(draw, d, lead))
  return chain(layers, d, lead)


def stacked(shapes, n):
  return jax.tree.map(lambda s: (n, *s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def scan_layers(draw, d, lead):
  """A loop over stacked layers; a kernel of each may be the same in all."""
  draw.note('scan over layers')
  closures, draw.closures = draw.closures, False
  inner, n = level(draw, d, lead), draw.pick(2, 3)
  shared = level(draw, d, lead) if draw.flip(0.3) else None
  draw.closures = closures
  reverse, remat = draw.flip(0.3), draw.flip(0.3)
  if remat:
    draw.note('remat')

  def apply(ctx, p, x):
    def step(x, own):
      x = inner.apply(ctx, own, x)
      return (shared.apply(ctx, p['shared'], x) if shared else x), None

    return ctx.scan(ctx.remat(step) if remat else step, x, p['layers'], reverse=reverse)[0]

  shapes = {'layers': stacked(inner.shapes, n)}
  return Layer(shapes | ({'shared': shared.shapes} if shared else {}), apply, d, lead)


def scan_time(draw, d, lead):
  """A recurrent layer over places; the last state or all of them are its result."""
  draw.note('scan over time')
  h, every, biased = draw.pick(3, 4), draw.flip(), draw.flip(0.7)
  read = draw.flip(0.3)  # the input's product outside of the loop
  shapes = {'w': (d, h), 'u': (h, h)} | ({'b': (h,)} if biased else {})

  def apply(ctx, p, x):
    first = 'nti,io->nto' if read else 'ni,io->no'
    if read:
      x, _ = product(ctx, first, x, p['w'])

    def step(state, x):
      if not read:
        x, _ = product(ctx, first, x, p['w'])
      y, arrange = product(ctx, 'ni,io->no', state, p['u'])
      y = ctx.bias(y, p['b'], arrange) if biased else y
      state = jnp.tanh(x + y)
      return state, (state if every else None)

    last, ys = ctx.scan(
      step, jnp.zeros((x.shape[0], h)) + 0 * x[:, 0, :1], x.swapaxes(0, 1)
    )  # as varied as x in a shard_map
    return ys.swapaxes(0, 1) if every else last

  return Layer(shapes, apply, h, lead if every else 'n')


def vmap_examples(draw, d, lead):
  """A layer written for one example."""
  draw.note('vmap per example')
  closures, draw.closures = draw.closures, False
  inner = some(draw, d, lead[1:], draw.pick(1, 2))
  draw.closures = closures
  return Layer(inner.shapes, lambda ctx, p, x: ctx.vmap(lambda x: inner.apply(ctx, p, x), x), inner.d, 'n' + inner.lead)


def vmap_members(draw, d, lead):
  """An ensemble: the same layer with several kernels."""
  draw.note('vmap over members')
  closures, draw.closures = draw.closures, False
  inner, n = dense(draw, d, lead), draw.pick(2, 3)
  inner = chain([inner, activation(draw, inner.d, lead)], d, lead)
  draw.closures = closures

  def apply(ctx, p, x):
    member = lambda own, by: inner.apply(ctx, own, by * x)  # noqa: E731
    return ctx.vmap(member, p['members'], jnp.arange(1.0, n + 1), examples=False).sum(0)

  return Layer({'members': stacked(inner.shapes, n)}, apply, inner.d, lead)


def branch(draw, d, lead):
  """One of two or three layers, by a traced number."""
  draw.note('branches')
  index = draw.arg(np.int32(draw.pick(0, 1)))
  first, second = level(draw, d, lead), level(draw, d, lead)
  plain = draw.flip(0.4)  # a branch without parameters

  def apply(ctx, p, x):
    branches = [lambda x: first.apply(ctx, p['first'], x), lambda x: second.apply(ctx, p['second'], x)]
    return ctx.switch(ctx.args[index], [*branches, jnp.sin] if plain else branches, x)

  return Layer({'first': first.shapes, 'second': second.shapes}, apply, d, lead)


def nested(draw, d, lead):
  """A layer inside of a nested jit or a rematerialised region."""
  how = draw.pick('jit', 'remat', 'both')
  draw.note('nested jit' if how == 'jit' else 'remat')
  inner = some(draw, d, lead, draw.pick(1, 2))

  def apply(ctx, p, x):
    fn = lambda p, x: inner.apply(ctx, p, x)  # noqa: E731
    fn = ctx.remat(fn) if how != 'jit' else fn
    return (ctx.jit(fn) if how != 'remat' else fn)(p, x)

  return inner._replace(apply=apply)


def tied(draw, d, lead):
  """A kernel used as it is and transposed."""
  draw.note('tied')
  h, act = draw.pick(3, 5), ACTIVATIONS[draw.pick(*ACTIVATIONS)]
  how = draw.pick('spec', 'layout')
  biased = draw.flip(0.3)

  def apply(ctx, p, x):
    y, arrange = product(ctx, f'{lead}i,io->{lead}o', x, p['w'])
    y = ctx.bias(y, p['b'], arrange) if biased else y
    y = act(y)
    if how == 'spec':
      return product(ctx, f'{lead}o,io->{lead}i', y, p['w'])[0]
    return product(ctx, f'{lead}o,oi->{lead}i', y, ctx.layout(lambda w: w.T, p['w']))[0]

  return Layer({'w': (d, h)} | ({'b': (h,)} if biased else {}), apply, d, lead)


def twice(draw, d, lead):
  draw.note('used twice')
  inner = level(draw, d, lead)
  return inner._replace(apply=lambda ctx, p, x: inner.apply(ctx, p, inner.apply(ctx, p, x)))


def residual(draw, d, lead):
  inner = level(draw, d, lead)
  return inner._replace(apply=lambda ctx, p, x: x + inner.apply(ctx, p, x))


def pieces(draw, d, lead):
  """A kernel cut into two products, or two kernels joined to one."""
  draw.note('pieces of a kernel')
  spec = f'{lead}i,io->{lead}o'
  if draw.flip():

    def apply(ctx, p, x):
      left, right = (ctx.layout(cut, p['w']) for cut in (lambda w: w[:, :2], lambda w: w[:, 2:]))
      left, right = product(ctx, spec, x, left)[0], product(ctx, spec, jnp.sin(x), right)[0]
      return jnp.concatenate([left, right], -1)

    return Layer({'w': (d, 4)}, apply, 4, lead)
  numpy_or_jax = lambda *w: (np if isinstance(w[0], np.ndarray) else jnp).concatenate(w, 1)  # noqa: E731

  def apply(ctx, p, x):
    return product(ctx, spec, x, ctx.layout(numpy_or_jax, p['v'], p['w']))[0]

  return Layer({'v': (d, 2), 'w': (d, 1)}, apply, 3, lead)


def fold(draw, d, lead):
  """Places folded into the axis of examples and back."""
  draw.note('folded places')
  closures, draw.closures = draw.closures, False
  inner = dense(draw, d, 'n')
  inner = chain([inner, activation(draw, inner.d, 'n')], d, 'n')
  draw.closures = closures

  def apply(ctx, p, x):
    y = inner.apply(ctx, p, x.reshape(-1, d))
    return y.reshape(*x.shape[:2], inner.d)

  return Layer(inner.shapes, apply, inner.d, lead)


def mixing(draw, d, lead):
  """Attention over places, or what is left of each feature less its mean over the examples."""
  form = 'centred' if lead == 'n' or (draw.flip(0.3) and not draw.divisible) else 'attention'
  draw.note(form)

  def apply(ctx, p, x):
    if form == 'centred':
      return x - x.mean(0)
    return jax.nn.softmax(jnp.einsum('...td,...sd->...ts', x, x)) @ x

  return Layer({}, apply, d, lead)


def pool(draw, d, lead):
  return Layer({}, lambda ctx, p, x: x.mean(-2), d, lead.replace('t', ''))


def some(draw, d, lead, number):
  """A chain of so many random layers."""
  layers = []
  for _ in range(number):
    makers = [dense] * 5 + [free] * 2 + [activation] * 2 + [scan_layers, branch, nested, tied, twice, residual, pieces]
    makers += [vmap_members, *random_tricks.ANYWHERE]
    if lead.startswith('n') and draw.closures:
      makers += [experts, vmap_examples] + ([mixing] if lead == 'nt' or not draw.divisible else [])
    if lead.startswith('n'):
      makers += random_tricks.OF_BATCHES
    if lead.startswith('n') and draw.closures and not draw.divisible:
      makers += [random_tricks.routed, random_tricks.tied_decoder, random_tricks.picked_kernels]
    makers += [random_tricks.chosen_kernel] if draw.flip(0.2) else []
    if lead == 'nt':
      makers += [scan_time, pool, fold] + ([] if draw.divisible else [random_tricks.learned_state])
    if 't' in lead:
      makers += [convolution, convolution, random_tricks.attention, random_tricks.beside]
    layer = draw.pick(*makers)(draw, d, lead)
    layers.append(layer)
    d, lead = layer.d, layer.lead
    if draw.flip(0.4):
      layers.append(activation(draw, d, lead))
  return chain(layers, d, lead)
