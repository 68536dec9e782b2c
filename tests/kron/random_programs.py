"""Random programs for `kron.curvature`: layers in a row, one to three marks of several sizes, a sum of means as the loss.

`generate(seed)` makes one; `random_check.check` compares what kron measures with `random_reference.Measured`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.kron.random_contexts import Mark, Plain, term
from tests.kron.random_layers import Draw, convolution, dense, embedding, tables
from tests.kron.random_regions import chain, pool, some
from tests.kron.random_trees import TREES


@dataclasses.dataclass
class Program:
  """A loss `loss(params, *args)` and how to write it out: `run(context, plain params, args)`."""

  seed: int
  kinds: list[str]
  params: Any
  args: tuple
  marks: list[Mark]
  fisher: str
  run: Callable
  tree: str = 'list'

  def wrapped(self):
    return TREES[self.tree][0](self.params)

  def wrapped_ids(self, ids):
    """The numbers of the entries of each parameter, in the order of the leaves of the wrapped tree."""
    return jax.tree.leaves(TREES[self.tree][0](jax.tree.unflatten(jax.tree.structure(self.params), ids)))

  def loss(self, marked=True, average=None):
    unwrap = TREES[self.tree][1]

    def loss(params, *args):
      return self.run(Plain(marked, average), unwrap(params), args)

    return loss


@dataclasses.dataclass
class Head:
  """One marked output: what makes it of the trunk's result, and the term of the loss that belongs to it."""

  layer: Any
  mark: Mark
  shape: str
  rows: int | None  # how many of the examples it has
  second: int | None  # the argument that is its own input, if it has one
  target: int
  mask: int | None
  weight: Any  # None, a number, or the argument that has one for each observation
  array: bool
  inside: bool  # an L2 term inside of the mean


def generate(seed, fisher=None, examples=None, divisible=False):
  """The program of a seed; `divisible`: its loss is a sum over examples, all of which every mark observes."""
  draw = Draw(seed)
  draw.sizes = {'n': examples or draw.pick(3, 4, 6), 't': draw.pick(3, 4)}
  draw.divisible = divisible
  source, trunk_input = _input(draw)
  d, lead = source.d, source.lead
  body = some(draw, d, lead, draw.pick(1, 1, 2, 2, 3))
  trunk = chain([source, body], body.d, body.lead)
  number = (draw.pick(2, 2, 3) if not divisible else 2) if draw.may('several marks', 0.35) else 1
  heads = [_head(draw, trunk, trunk_input, k) for k in range(number)]
  outside = draw.may('L2 outside', 0.15)
  shapes = {'trunk': trunk.shapes, 'heads': [h.layer.shapes for h in heads]}
  params = jax.tree.map(
    lambda s: jnp.asarray(draw.normal(*s) / np.sqrt(max(1, int(np.prod(s[:-1])))) + 0.1),
    shapes,
    is_leaf=lambda s: isinstance(s, tuple),
  )
  tree = draw.pick(*['list'] * 6, *TREES)
  if tree != 'list':
    draw.note('tree: ' + tree)
  chosen = draw.pick('exact', 'empirical')
  run = _run(trunk, heads, trunk_input, outside)
  marks = [h.mark for h in heads]
  return Program(seed, draw.kinds, params, tuple(draw.args), marks, fisher or chosen, run, tree)


def _input(draw):
  kind = draw.pick('vector', 'vector', 'sequence', 'sequence', 'image', 'tokens', 'tables')
  n, t, d = draw.sizes['n'], draw.sizes['t'], draw.pick(3, 4)
  if kind == 'tables':
    return chain([tables(draw)], None, None), None
  if kind == 'tokens':
    return chain([embedding(draw, draw.pick('n', 'nt'))], None, None), None
  identity = lambda layers, lead, d: chain(layers, d, lead)  # noqa: E731
  if kind == 'image':
    index = draw.arg(draw.normal(n, 5, 4, d))
    conv = convolution(draw, d, 'n', rank=2)
    flat = pool(draw, conv.d, 'nt')._replace(apply=lambda ctx, p, x: x.mean((1, 2)))
    return chain([conv, flat], conv.d, 'n'), index
  shape = (n, d) if kind == 'vector' else (n, t, d)
  return identity([], 'n' if kind == 'vector' else 'nt', d), draw.arg(draw.normal(*shape))


FORMS = {'vmap': 'mark in vmap', 'loop': 'mark in scan'}


def _head(draw, trunk, trunk_input, k):
  kind = draw.pick('categorical', 'bernoulli', 'gaussian', 'gaussian', 'loss')
  second, rows = _rows(draw, trunk_input, k)
  length = draw.sizes['n'] if rows is None else rows
  shape = _form(draw, kind, trunk, length)
  lead = 'n' if shape == 'pooled' else trunk.lead
  inner = lead[1:] if shape == 'vmap' else lead
  scalar = shape == 'flat' or (shape == 'vmap' and kind != 'categorical' and not inner and draw.flip())
  c = 1 if scalar or shape == 'column' else draw.pick(2, 3)
  closures, draw.closures = draw.closures, False
  layer = dense(draw, trunk.d, inner, out=c)
  draw.closures = closures
  t = draw.sizes['t']
  event_ndims = 0 if scalar else 2 if shape == 'event2' else 1
  leading = (length,) if lead == 'n' or shape == 'event2' else (length, t)
  event = () if scalar else (t, c) if shape == 'event2' else (c,)
  draw.note(FORMS.get(shape, shape) if shape != 'class' else '(N, T, C)' if len(leading) == 2 else '(N, C)')
  target = draw.rng.integers(0, c, leading) if kind == 'categorical' else draw.normal(*leading, *event)
  target = draw.arg((target > 0) * 1.0 if kind == 'bernoulli' else target)
  mask = weight = None
  array, count = False, float(np.prod(leading))
  if draw.may('mask', 0.3):
    kept = draw.rng.random(leading) < 0.6
    kept[0], kept[-1] = True, False
    mask, count = draw.arg(kept if draw.flip(0.7) else kept.astype(np.int32)), float(kept.sum())
  if draw.may('weight', 0.3):
    array = draw.flip()
    weight = draw.arg(0.2 + draw.rng.random(leading)) if array else draw.pick(0.3, 2.0, 3)
  inside = draw.may('L2 inside', 0.1)
  mark = Mark(kind, event_ndims, draw.pick(1.0, 0.5) if kind == 'gaussian' else 1.0, count)
  return Head(layer, mark, shape, rows, second, target, mask, weight, array, inside)


def _rows(draw, trunk_input, k):
  """The argument that a mark's own input is, if it has one, and how many examples it has, if not all."""
  if draw.divisible:
    return None, None
  if k and trunk_input is not None and not draw.closed and draw.flip():
    draw.note('second batch')
    second = draw.arg(draw.normal(draw.pick(2, 5), *draw.args[trunk_input].shape[1:]))
    return second, len(draw.args[second])
  if k and draw.flip():
    draw.note('part of the batch')
    return None, draw.pick(2, 3)
  return None, None


def _form(draw, kind, trunk, length):
  forms = ['class', 'class', 'vmap'] + (['loop'] if length % 2 == 0 and not draw.divisible else [])
  if kind != 'categorical':
    forms += ['flat', 'column'] if trunk.lead == 'n' else ['event2', 'pooled']
  return draw.pick(*forms)


def _run(trunk, heads, trunk_input, outside):
  def run(ctx, params, args):
    ctx.args = args
    first = None if trunk_input is None else args[trunk_input]
    h = trunk.apply(ctx, params['trunk'], first)
    loss = 0.0
    for k, (head, p) in enumerate(zip(heads, params['heads'], strict=True)):
      own = h if head.second is None else trunk.apply(ctx, params['trunk'], args[head.second])
      loss = loss + _term(ctx, head, k, p, own[: head.rows] if head.rows else own, args)
    if outside:
      loss = loss + 0.1 * sum((ctx.value(w) ** 2).sum() for w in _kernels(params['heads']))
    return loss

  return run


def _kernels(p):
  leaves = jax.tree_util.tree_leaves_with_path(p, is_leaf=lambda x: hasattr(x, 'ids'))
  return [w for path, w in leaves if path[-1].key == 'w']


def _term(ctx, head, k, p, h, args):
  y = args[head.target]
  mask = None if head.mask is None else args[head.mask]
  weight = args[head.weight] if head.array else head.weight

  def losses(h, y, mask, weight):
    z = head.layer.apply(ctx, p, h)
    z = z[..., 0] if head.mark.event_ndims == 0 else z
    z = ctx.observe(head.mark, k, z, y, mask, weight)
    l = term(head.mark, z, y)
    return l + 0.1 * sum((ctx.value(w) ** 2).sum() for w in _kernels(p)) if head.inside else l

  h = h.mean(1) if head.shape == 'pooled' else h
  if head.shape in ('vmap', 'loop'):
    given = {'mask': mask, 'weight': weight if head.array else None}
    more = {name: x for name, x in given.items() if x is not None}
    constant = None if head.array else weight
    one = lambda h, y, more: losses(h, y, more.get('mask'), more.get('weight', constant))  # noqa: E731
    if head.shape == 'vmap':
      l = ctx.vmap(one, h, y, more)
    else:
      microbatches = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), (h, y, more))
      l = ctx.scan(lambda _, xs: (None, one(*xs)), None, microbatches)[1]
      l = l.reshape(-1, *l.shape[2:])
  else:
    l = losses(h, y, mask, weight)
  l = l if weight is None else l * weight
  if mask is None:
    return ctx.average(l.sum(), l.size)
  return ctx.average((l * mask).sum(), mask.sum())
