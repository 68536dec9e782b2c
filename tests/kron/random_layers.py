"""Layers of random programs, each written once and run by `random_contexts.Plain` and `Reference`.

A layer is made by a function of a `Draw`, the number of features and the letters of the leading axes ('n' examples, 't'
places). It has the shapes of its parameters and a function of (context, parameters, x).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layer(NamedTuple):
  shapes: Any
  apply: Callable
  d: int
  lead: str


class Draw:
  """Random choices from one seed; `kinds` says what was chosen, `args` are the loss's arguments."""

  avoid: frozenset[str] = frozenset()  # kinds that are not drawn

  def __init__(self, seed):
    self.rng = np.random.default_rng(seed)
    self.kinds, self.args = [], []
    self.sizes = {}
    self.closures = True  # whether a layer may close over an array that leads with examples
    self.closed = False  # whether one does
    self.divisible = False  # whether nothing may couple examples

  def pick(self, *choices):
    return choices[self.rng.integers(len(choices))]

  def flip(self, probability=0.5):
    return bool(self.rng.random() < probability)

  def mixed(self, letters):
    return ''.join(self.rng.permutation(list(letters)))

  def normal(self, *shape):
    return self.rng.standard_normal(shape)

  def arg(self, x):
    """Adds an argument of the loss; returns its index."""
    self.args.append(np.asarray(x))
    return len(self.args) - 1

  def may(self, kind, probability):
    """Whether a kind is drawn; notes it if so."""
    drawn = self.flip(probability) and kind not in self.avoid
    if drawn:
      self.note(kind)
    return drawn

  def note(self, kind):
    if kind not in self.kinds:
      self.kinds.append(kind)


@jax.custom_vjp
def quantised(w):
  return jnp.round(w * 4) / 4


quantised.defvjp(lambda w: (quantised(w), None), lambda _, g: (g,))


@jax.custom_jvp
def soft(x):
  return jnp.tanh(x)


soft.defjvp(lambda primals, tangents: (soft(primals[0]), (1 - soft(primals[0]) ** 2) * tangents[0]))

ACTIVATIONS = {'tanh': jnp.tanh, 'sin': jnp.sin, 'relu': jax.nn.relu, 'silu': jax.nn.silu, 'custom_jvp': soft}


def activation(draw, d, lead):
  name = draw.pick(*ACTIVATIONS)
  if name == 'custom_jvp':
    draw.note('custom_jvp')
  return Layer({}, lambda ctx, p, x: ACTIVATIONS[name](x), d, lead)


# --- kernels


def product(ctx, spec, x, w, flip=False, where=None, coefficient=None, one_hot=False):
  """An einsum of data and a kernel; returns the result and how it is arranged as (slots, uses, outputs)."""
  operands, ys = spec.split('->')
  xs, ws = operands.split(',')
  value = ctx.value(w)
  y = jnp.einsum(f'{ws},{xs}->{ys}', value, x) if flip else jnp.einsum(spec, x, value)
  slots = [c for c in ws if c in xs and c in ys]
  inner, outer = [c for c in ws if c not in ys], [c for c in ws if c not in xs]
  uses = [c for c in xs if c not in ws]
  sizes = dict(zip(xs + ws, (*x.shape, *np.shape(value)), strict=True))
  size = lambda letters: int(np.prod([sizes[c] for c in letters], dtype=int))  # noqa: E731

  def arranged(a, labels, *groups):
    order = [labels.index(c) for group in groups for c in group]
    return a.transpose(order).reshape(*(size(group) for group in groups))

  arrange = lambda a: arranged(a, ys, slots, uses, outer)  # noqa: E731
  if not ctx.unrolled:
    return y, arrange
  rows, columns = arranged(x, xs, slots, uses, inner), None
  if coefficient is not None:
    kind, c = coefficient
    c = arranged(jnp.broadcast_to(c, np.shape(value)), ws, slots, inner, outer)
    if kind == 'columns':
      columns = c[:, 0]
    else:
      rows = rows * c[:, None, :, 0]
  if where is not None:
    where = jnp.broadcast_to(where, x.shape)
    where = arranged(where, xs, slots, uses, inner)[..., 0]
  ids = arranged(w.ids, ws, slots, inner, outer)
  return ctx.result(ctx.linear(y, rows, ids, arrange, where, columns, one_hot), arrange), arrange


TREATMENTS = {
  'scalar': 'scaled kernel', 'rows': 'scaled rows', 'columns': 'scaled columns', 'mask': 'pruned', 'where': 'pruned',
  'straight': 'straight-through', 'rule': 'straight-through', 'cast': 'cast', 'minus': 'scaled kernel', 'tril': 'pruned',
}  # fmt: skip


def treatment(draw, shape, ws, inner):
  """What happens to a kernel before its product: (a function of it, (kind, coefficient) if it is scaled)."""
  kind = draw.pick(*['none'] * 8, *TREATMENTS)
  if kind == 'none' or TREATMENTS[kind] in draw.avoid:
    return (lambda w: w), None
  draw.note(TREATMENTS[kind])
  if kind == 'scalar':
    c = draw.pick(0.5, -1.5, np.float64(0.7), jnp.float64(1.3))
    return (lambda w: w * c), ('rows', np.full((1,) * len(shape), float(c)))
  if kind in ('rows', 'columns'):
    size = [n if (c in inner) == (kind == 'rows') else 1 for n, c in zip(shape, ws, strict=True)]
    c = 1 + 0.5 * draw.rng.random(size)
    constant = draw.pick(np.asarray, jnp.asarray)(c)
    return (lambda w: w * constant), ('rows' if c.size == 1 else kind, c)  # a scale of all is counted with the rows
  if kind in ('mask', 'where'):
    keep = draw.rng.random(shape) < 0.6
    keep.reshape(-1)[0] = True
    kept = draw.pick(np.asarray, jnp.asarray)(keep if kind == 'where' or draw.flip() else keep.astype(np.float64))
    if kind == 'where':
      return (lambda w: jnp.where(kept, w, 0)), None
    # A mask along one axis scales inputs or outputs, as any other coefficient does.
    (axis,) = long if len(long := [c for c, n in zip(ws, shape, strict=True) if n > 1]) == 1 else (None,)
    scaled = axis and ('rows' if axis in inner else 'columns')
    return (lambda w: w * kept), scaled and (scaled, keep.astype(np.float64))
  if kind == 'minus':
    return (lambda w: -w), ('rows', np.full((1,) * len(shape), -1.0))
  if kind == 'tril':
    return (jnp.tril if len(shape) == 2 else lambda w: w), None
  if kind == 'cast':
    return (lambda w: w.astype(jnp.float64) * 1.0), None
  if kind == 'straight':
    return (lambda w: w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w)), None
  return quantised, None


def storage(draw, shape):
  """How a kernel lies in its parameter: that one's shape, and the way from it to the kernel."""
  how = draw.pick(*['plain'] * 15, *['transposed'] * 4, *['flat', 'flipped', 'cut'] * 2, 'permuted', 'rolled')
  if how not in ('plain', 'transposed'):
    if 'moved kernel' in draw.avoid:
      return shape, (lambda w: w)
    draw.note('moved kernel')
  order = draw.rng.permutation(shape[0])
  if how == 'cut':
    return (shape[0] + 2, *shape[1:]), (lambda w: w[1:-1])
  restore = {
    'plain': lambda w: w, 'transposed': lambda w: w.T, 'flat': lambda w: w.reshape(shape), 'flipped': lambda w: w[::-1],
    'permuted': lambda w: w[order], 'rolled': lambda w: (np if isinstance(w, np.ndarray) else jnp).roll(w, 1, -1),
  }[how]  # fmt: skip
  return {'transposed': shape[::-1], 'flat': (int(np.prod(shape)),)}.get(how, shape), restore


def dense(draw, d, lead, out=None, plain=False):
  """A matrix product in any layout, with or without bias."""
  o = out or draw.pick(3, 4)
  split_in, split_out = (not plain and d == 4 and draw.flip(0.25)), (not plain and o == 4 and draw.flip(0.25))
  inner, outer = ('ab' if split_in else 'i'), ('hk' if split_out else 'o')
  sizes = {**draw.sizes, 'a': 2, 'b': 2, 'h': 2, 'k': 2, 'i': d, 'o': o}
  ws = inner + outer if plain or draw.flip() else draw.mixed(inner + outer)
  ys = lead + outer if plain or draw.flip(0.6) else draw.mixed(lead + outer)
  if ws + ys != inner + outer + lead + outer:
    draw.note('layout')
  flip, biased = draw.flip(0.3), draw.flip(0.6)
  shape = tuple(sizes[c] for c in ws)
  store, restore = storage(draw, shape)
  treat, coefficient = ((lambda w: w), None) if plain else treatment(draw, shape, ws, inner)
  xs = lead + inner
  padded = not plain and len(lead) == 2 and draw.closures and draw.may('used', 0.2)
  if padded:
    there = draw.rng.random((draw.sizes['n'], draw.sizes['t'], *[1] * len(inner))) < 0.7
    there[:, 0] = True
    there, draw.closed = draw.arg(there), True
  shapes = {'w': store}
  if biased:
    shapes['b'] = tuple(sizes[c] for c in ys if c in outer)
  back = [ys.index(c) for c in lead + outer]

  def apply(ctx, p, x):
    where = ctx.args[there] if padded else None
    x = x.reshape(*x.shape[: len(lead)], *(sizes[c] for c in inner))
    if padded:
      x = ctx.used(x, where)
    w = ctx.effective(ctx.layout(restore, p['w']), treat)
    y, arrange = product(ctx, f'{xs},{ws}->{ys}', x, w, flip, where, coefficient)
    if biased:
      b = ctx.layout(lambda b: b.reshape([sizes[c] if c in outer else 1 for c in ys]), p['b'])
      y = ctx.bias(y, b, arrange, ys.index('n') if 'n' in ys else 0)
    wide = [y.shape[k] for k in back]
    y = y.transpose(back).reshape(*wide[: len(lead)], o)
    if not biased:
      y = ctx.result(y, lambda a: arrange(a.reshape(wide).transpose([back.index(k) for k in range(len(back))])))
    return y if not padded else jnp.where(where.reshape(*where.shape[:2], 1), y, 0)

  return Layer(shapes, apply, o, lead)


def experts(draw, d, lead):
  """Each example goes to some of a few experts."""
  e, o = draw.pick(2, 3), draw.pick(3, 4)
  draw.note('experts')
  marked, garbage = draw.may('used', 0.8), draw.flip()
  there = draw.rng.random((*(draw.sizes[c] for c in lead), e)) < 0.6
  there[0] = True
  index, draw.closed = draw.arg(there), True
  letters = lead + 'ei'
  xs, ws = draw.mixed(letters), draw.mixed('eio')
  ys = draw.mixed(lead + 'eo')
  early = draw.flip()  # marked before it is moved to its layout
  sizes = {'e': e, 'i': d, 'o': o}
  flip = draw.flip(0.3)

  def apply(ctx, p, x):
    there = ctx.args[index][..., None]
    routed = jnp.where(there, x[..., None, :], 7.0 if garbage else 0.0)
    perm = [letters.index(c) for c in xs]
    if marked and early:
      routed = ctx.used(routed, there)
    routed, where = routed.transpose(perm), there.transpose(perm)
    if marked and not early:
      routed = ctx.used(routed, where)
    y, _ = product(ctx, f'{xs},{ws}->{ys}', routed, p['w'], flip, where if marked else None)
    y = y.transpose([ys.index(c) for c in lead + 'eo'])
    return jnp.where(there, y, 0).sum(-2)

  return Layer({'w': tuple(sizes[c] for c in ws)}, apply, o, lead)


def tables(draw, lead='n'):
  """One-hot tables of several features, some of them missing; the input of a program."""
  f, v, c = 2, 4, draw.pick(3, 4)
  draw.note('one-hot tables')
  features = draw.rng.integers(0, v + draw.flip(), (draw.sizes['n'], f))
  index = draw.arg(features)
  xs, ws, ys = draw.pick('nfv', 'fnv'), draw.mixed('fvc'), draw.mixed('nfc')
  sizes = {'f': f, 'v': v, 'c': c}

  def apply(ctx, p, x):
    hot = jax.nn.one_hot(ctx.args[index], v, dtype=jnp.float64)
    where = hot.sum(-1, keepdims=True) > 0
    if xs == 'fnv':
      hot, where = hot.swapaxes(0, 1), where.swapaxes(0, 1)
    y, _ = product(ctx, f'{xs},{ws}->{ys}', hot, p['t'], where=where, one_hot=True)
    return y.transpose([ys.index(c) for c in 'nfc']).sum(1)

  return Layer({'t': tuple(sizes[c] for c in ws)}, apply, c, 'n')


def embedding(draw, lead):
  """A table of tokens; the input of a program."""
  v, d = 5, draw.pick(3, 4)
  draw.note('embedding')
  form = draw.pick('index', 'take', 'one_hot')
  index = draw.arg(draw.rng.integers(0, v, [draw.sizes[c] for c in lead]))

  def apply(ctx, p, x):
    tokens, table = ctx.args[index], ctx.value(p['t'])
    hot = jax.nn.one_hot(tokens, v, dtype=jnp.float64)
    y = hot @ table if form == 'one_hot' else jnp.take(table, tokens, axis=0) if form == 'take' else table[tokens]
    if not ctx.unrolled:
      return y
    return ctx.linear(y, hot.reshape(1, -1, v), p['t'].ids[None], lambda a: a.reshape(1, -1, d))

  return Layer({'t': (v, d)}, apply, d, lead)


def convolution(draw, d, lead, rank=1):
  """A convolution over the places between the first and the last axis."""
  draw.note(f'conv {rank}-D')
  groups = draw.pick(1, 1, 2) if d % 2 == 0 else 1
  o = draw.pick(2, 4) if groups == 2 else draw.pick(3, 4)
  k, stride, dilation = draw.pick(1, 2, 3), draw.pick(1, 1, 2), draw.pick(1, 1, 2)
  padding = draw.pick('SAME', 'VALID', ((1, 0),) * rank, ((2, 1),) * rank)
  if padding == 'VALID' or rank == 1:
    k, dilation = (min(k, 2) if draw.sizes['t'] > 1 else 1), 1
  biased = draw.flip()
  letters = 'TUV'[:rank]
  numbers = (f'N{letters}C', f'{letters}IO', f'N{letters}C')
  shapes = {'w': (k,) * rank + (d // groups, o), **({'b': (o,)} if biased else {})}
  pads = lambda length: jax.lax.padtype_to_pads(length, ((k - 1) * dilation + 1,) * rank, (stride,) * rank, padding)  # noqa: E731
  if rank == 1:
    before = draw.sizes['t']
    sides = pads((before,)) if isinstance(padding, str) else padding
    draw.sizes['t'] = (before + sum(sides[0]) - (k - 1) * dilation - 1) // stride + 1

  def rows_of(x):
    """The patches, (groups, places, taps * channels)."""
    sides = pads(x.shape[1:-1]) if isinstance(padding, str) else padding
    x = jnp.pad(x, ((0, 0), *sides, (0, 0)))
    wide = [(n - (k - 1) * dilation - 1) // stride + 1 for n in x.shape[1:-1]]
    patches = []
    for tap in np.ndindex(*(k,) * rank):
      at = tuple(
        slice(t * dilation, t * dilation + (n - 1) * stride + 1, stride) for t, n in zip(tap, wide, strict=True)
      )
      patches.append(x[(slice(None), *at)])
    found = jnp.stack(patches, -2).reshape(-1, k**rank, groups, d // groups)
    return found.transpose(2, 0, 1, 3).reshape(groups, -1, k**rank * d // groups)

  def arrange(a):
    return a.reshape(-1, groups, o // groups).swapaxes(0, 1)

  def apply(ctx, p, x):
    w = ctx.value(p['w'])
    one = not lead.startswith('n')
    x = x[None] if one else x
    y = jax.lax.conv_general_dilated(
      x, w, (stride,) * rank, padding, rhs_dilation=(dilation,) * rank, dimension_numbers=numbers,
      feature_group_count=groups,
    )  # fmt: skip
    if ctx.unrolled:
      ids = p['w'].ids.reshape(-1, groups, o // groups).swapaxes(0, 1)
      y = ctx.result(ctx.linear(y, rows_of(x), ids, arrange), arrange)
    y = ctx.bias(y, p['b'], arrange) if biased else y
    return y[0] if one else y

  return Layer(shapes, apply, o, lead)


# --- other parameters


def free(draw, d, lead):
  """A scale, a shift, both, or a number that all entries share."""
  form = draw.pick('scale', 'shift', 'both', 'both', 'temperature', 'norm')
  draw.note({'both': 'scale and shift', 'norm': 'scale and shift', 'temperature': 'free'}.get(form, form))
  t = draw.sizes['t']
  shape = (
    draw.pick((d,), (d,), (1, d), (t, d), (t, 1)) if 't' in lead else draw.pick((d,), (d,), (1, d) if lead else (d,))
  )
  if form in ('both', 'norm') and draw.flip(0.8):
    shape = (d,)
  shapes = {'scale': {'s': shape}, 'shift': {'b': shape}, 'temperature': {'s': ()}}.get(form, {'s': shape, 'b': shape})
  curve = form == 'temperature' and draw.flip()

  def apply(ctx, p, x):
    if form == 'norm':
      x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 0.1)
    if 's' in p:
      s = ctx.free(p['s'], x)
      x = x * (jnp.exp(s) if curve else s)
    return x + ctx.free(p['b'], x, shift=True) if 'b' in p else x

  return Layer(shapes, apply, d, lead)
