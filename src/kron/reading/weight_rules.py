"""Rules for one operation: how it moves, joins or scales a weight, and where it makes the weight meet data."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ...program import CASTS, ENTRYWISE, Op, Ref, bind, copies_p, is_known, passes_gradient
from ..operators.weights import Weight, joined
from . import kernels
from .orders import picks_once, summed_over
from .sites import DATA, FIXED, INPUT, Derived, Walk
from .values import (
  closed_over,
  constant,
  differentiable,
  is_data,
  is_entrywise,
  is_zero,
  varying_axes,
)

_MOVES = ('slice', 'rev', 'dynamic_slice', 'gather', 'split', 'pad')


def results(op: Op, walk: Walk) -> list[Any]:
  """Returns the kinds of an operation's results, and notes the sites and refusals that it finds on the way."""
  kinds = [walk.kind(v) for v in op.inputs]
  if op.name == 'stop_gradient' or (op.outputs and not any(differentiable(v) for v in op.outputs)):
    return [_held(kinds)] * len(op.outputs)
  if op.name == copies_p.name:
    kind = settle(op.inputs[0], walk)
    if not isinstance(kind, Weight):
      return [kind]
    free(op, 0, kind, walk)
    return [DATA]
  weights = [i for i, kind in enumerate(kinds) if isinstance(kind, Weight)]
  for rule in (_moved, _joined, _entrywise, kernels.meet) if weights else ():
    weight = rule(op, kinds, weights, walk)
    if weight is not None:
      return weight
  settled = [settle(v, walk) for v in op.inputs]
  if settled != kinds:
    return results(op, walk)  # one of two weights was an activation, which the other meets here
  if weights and any(is_data(k) for k in kinds):
    for i in weights:
      if _may_be_free(op.inputs[i], kinds[i]):
        free(op, i, kinds[i], walk)
        kinds[i] = DATA
  return [_met(op, kinds, walk)] * len(op.outputs)


def _held(kinds: list[Any]) -> str | None:
  """Returns the kind of a value without a gradient."""
  if any(is_data(k) for k in kinds):
    return INPUT
  # A weight that has met data may yet turn out to be an activation, so its value counts as an input.
  met = any(isinstance(k, Weight) and k.meeting is not None for k in kinds)
  return INPUT if met else FIXED if any(k is not None for k in kinds) else None


def straight_through(op: Op, walk: Walk) -> list[Any] | None:
  """Handles a function with its own derivative rule that passes the gradient of a weight on unchanged.

  An example is rounding by a straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): the factors are those of
  the weight that comes out. A function that `operators=` gives in plain form is followed as it is written.
  """
  kinds = [walk.kind(v) for v in op.inputs]
  if op.region != 'custom' or len(op.outputs) != 1:
    return None
  for i, weight in enumerate(kinds):
    if not isinstance(weight, Weight) or weight.meeting is not None or op.inputs[i].shape != op.outputs[0].shape:
      continue
    if not (op.bodies[0].outputs[0] is op.bodies[0].inputs[i] if op.plain else passes_gradient(op, i)):
      continue
    others = [k for j, k in enumerate(kinds) if j != i]
    if DATA in others:
      return None
    met = weight.met.union(*(walk.params(k) for k in others))
    return _chained(op, [weight._replace(met=met)], {weight.params: ((i, weight.scale),)}, walk)
  return None


def _met(op: Op, kinds: list[Any], walk: Walk) -> Any:
  """Returns the kind of a result where no rule applies, and refuses parameters that met data without a rule."""
  params = frozenset().union(*(walk.params(kind) for kind in kinds))
  if not params:
    return next((k for k in (DATA, INPUT, FIXED) if k in kinds), None)
  if op.name == 'while':
    walk.refuse(
      params, 'while (a loop whose length is not known has no reverse mode; give fori_loop constant bounds)', op
    )
    return DATA
  step = next((kind.op for kind in kinds if isinstance(kind, Derived)), op)
  scalar = bool(op.outputs) and not op.outputs[0].shape
  if not any(is_data(k) for k in kinds):
    return Derived(params, step)
  if DATA not in kinds and (scalar or (op.name in ENTRYWISE and not walk.from_loss)):
    # A weighted L2 term, or one that compares with old parameters. If it were an output, its mark would refuse it.
    return Derived(params, step)
  if op.name in ('add', 'sub', 'add_any') and scalar:  # the loss plus an L2 term, unless it goes into an output
    walk.survey.regularisers.update(params)
    if walk.from_loss and not walk.depth:
      return DATA
  if op.name in ('add', 'sub', 'add_any') and _beside_losses(op, kinds, walk):
    # The term is added to the losses of single examples before their mean. If it reached a mark, that would refuse it.
    walk.survey.regularisers.update(params)
    walk.refuse(params, op.name, op, before_marks=True)
    return DATA
  for kind in kinds:
    what = f'{kind.op.name} (a computed weight), then {op.name}' if isinstance(kind, Derived) else op.name
    walk.refuse(walk.params(kind), what, op)
  return DATA


def _beside_losses(op: Op, kinds: list[Any], walk: Walk) -> bool:
  """Returns whether a term of parameters alone is added to values that depend on observed outputs."""
  return all(isinstance(k, Derived) or (k == DATA and walk.is_behind(v)) for v, k in zip(op.inputs, kinds, strict=True))


def settle(value: Any, walk: Walk, whole: bool = False) -> Any:
  """Returns the kind of a value that is read as a result.

  A weight that met data entry by entry is an activation, and its last meeting is the site.

  whole: whether a value that could be a kernel scaled by data stays a weight.
  """
  kind = walk.kind(value)
  if not isinstance(kind, Weight) or kind.meeting is None or (whole and kind.covers(value.shape)):
    return kind
  op = walk.survey.makers[kind.meeting]
  if kind.spread:
    walk.refuse(walk.params(kind), f'{op.name} (with data that is repeated later)', op)
  elif not any(site.weight.params == kind.params for site in walk.survey.sites.get(kind.meeting, ())):
    position = next(i for i, v in enumerate(op.inputs) if getattr(walk.kind(v), 'params', None) == kind.params)
    _add_entrywise(op, position, walk.kind(op.inputs[position]), walk)
  walk.kinds[value.index] = DATA
  return DATA


def free(op: Op, position: int, weight: Weight, walk: Walk) -> None:
  """Notes that every example has a copy of a parameter at this operand."""
  weight = weight.beside_examples()
  if weight.met or weight.gains:
    walk.refuse(walk.params(weight), f'{op.name} (after it was combined with a computed value)', op)
  elif not _may_be_free(op.inputs[position], weight):
    walk.refuse(walk.params(weight), f'{op.name} (with no leading axis that counts examples)', op)
  else:
    walk.add('free', op, position, weight)


def _may_be_free(value: Any, weight: Weight) -> bool:
  return bool(value.shape) and 0 not in weight.beside_examples().axes and weight.meeting is None


# --- rearrangements


def _moved(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """Handles an operation that only rearranges, repeats or casts one weight."""
  if weights != [0] or (kinds[0].meeting is not None and not walk.read_once(op.inputs[0])):
    return None
  value, weight = op.inputs[0], kinds[0]
  old, new = value.shape, op.outputs[0].shape
  if op.name in CASTS:
    out = [weight] * len(op.outputs)
  elif op.name == 'transpose':
    out = [weight.transposed(op.params['permutation'])]
  elif op.name == 'broadcast_in_dim':
    out = [weight.broadcast(old, new, tuple(map(int, op.params['broadcast_dimensions'])))]
  elif op.name == 'tile' and all(a in (1, b) for a, b in zip(old, new, strict=True)):
    out = [weight.broadcast(old, new, tuple(range(len(old))))]
  elif op.name in ('squeeze', 'expand_dims', 'reshape'):
    first = op.params.get('dimensions') if op.name == 'reshape' else None  # a reshape may transpose first
    first = tuple(range(len(old))) if first is None else first
    out = [weight.transposed(first).reshaped(tuple(old[a] for a in first), new)]
  elif op.name in _MOVES:
    out = _picked(op, weight, walk)
  else:
    return None
  if any(w is None for w in out):
    return None
  return _chained(op, out, {weight.params: ((0, weight.scale),)}, walk)


def _picked(op: Op, weight: Weight, walk: Walk) -> list[Weight | None]:
  """Handles an operation that picks entries at places that the program itself knows."""
  if weight.chained:
    return [None]
  old = op.inputs[0].shape
  if op.name == 'split':
    axis, start, out = op.params['axis'], 0, []
    for size, v in zip(op.params['sizes'], op.outputs, strict=True):
      limit = start + int(size)
      cut = lambda x, a=start, b=limit: jnp.take(x, jnp.arange(a, b), axis=axis)  # noqa: E731
      out.append(weight.picked(old, v.shape, 'slice', ('split', axis, start, limit), cut))
      start = limit
    return out
  rest = [constant(v, walk) for v in op.inputs[1:]]
  new = op.outputs[0].shape
  if any(v is None for v in rest):
    return [None]
  rows = new and new[0] in walk.examples and any(closed_over(v, walk) for v in op.inputs[1:])
  if rows and not summed_over(op.outputs[0], 0, walk):  # a batch that the loss closes over
    return [None]
  described = (str(sorted((k, str(v)) for k, v in op.params.items())), tuple((v.shape, v.tobytes()) for v in rest))
  apply = lambda x: bind(op, x, *(v.astype(x.dtype) if op.name == 'pad' else v for v in rest))[0]  # noqa: E731
  if op.name in ('slice', 'rev'):
    return [weight.picked(old, new, op.name, described, apply)]
  if len(weight.axes) < len(old):
    return [None]
  picked = weight._then(op.name, described, apply, new)
  return [picked._replace(axes=tuple(range(len(new))), unique=weight.unique and picks_once(op, rest, old))]


def _joined(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """Handles a concatenation of weights alone."""
  if op.name not in ('concatenate', 'stack') or len(weights) < len(kinds) or len(weights) < 2:
    return None
  args = tuple(sorted((k, str(v)) for k, v in op.params.items()))
  weight = joined(kinds, op.name, args, lambda *x: bind(op, *x)[0], op.outputs[0].shape)
  return None if weight is None else [weight]


# --- entry by entry


def _entrywise(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """Handles an elementwise operation, which scales a weight further or makes it meet data."""
  shape = op.outputs[0].shape if op.outputs else None
  operands = [v for v in op.inputs if isinstance(v, Ref) and v.shape]
  if not is_entrywise(op) or len(op.outputs) != 1 or any(len(v.shape) != len(shape) for v in operands):
    return None
  i, weight = weights[0], kinds[weights[0]]
  if weight.meeting is not None and not walk.read_once(op.inputs[i]):
    return None  # an activation that several operations read; none of them scales the weight further
  if len(weights) > 1:
    return _of_two_weights(op, kinds, weights, walk)
  aligned = align(op, i, weight)
  others = [(v, k) for j, (v, k) in enumerate(zip(op.inputs, kinds, strict=True)) if j != i]
  data = [k for _, k in others if is_data(k)]
  scaling = op.name == 'mul' or (op.name == 'div' and i == 0)
  if aligned.covers(shape) and sum(shape[a] > 1 for a in aligned.axes) > 1 and _masks(op, i, walk):
    return [aligned]
  if not weight.chained and not data:
    if op.name == 'neg':
      return [weight._replace(scale=-weight.scale)]
    numbers = [v for v, k in others if k is None and not isinstance(v, Ref) and not jnp.iscomplexobj(v)]
    if scaling and numbers:
      number = float(numbers[0])
      return [aligned._replace(scale=weight.scale * number if op.name == 'mul' else weight.scale / number)]
    if op.name in ('add', 'sub', 'add_any') and others[0][1] in (None, FIXED):  # such as 1 + w
      return [aligned._replace(scale=-weight.scale if op.name == 'sub' and i == 1 else weight.scale)]
  if data and not scaling:
    if data == [INPUT] * len(data) and 0 in aligned.axes:
      return None  # compared with an array of the same shape, such as its old value
    if weight.meeting is not None:
      return None  # it was scaled already, so it is an activation
    _add_entrywise(op, i, weight, walk)
    return [DATA]
  varies = aligned.varies
  if scaling:
    varies |= {a for v, _ in others for a in varying_axes(v, walk) if a < len(shape)}
  elif op.name not in ('neg', 'add', 'sub', 'add_any', *CASTS):
    varies |= set(aligned.axes)
  curved = not scaling and op.name not in ('neg', 'add', 'sub', 'add_any', *CASTS)
  own_shift = not scaling and any(walk.params(k) & walk.params(weight) for _, k in others)
  met = aligned.met.union(*(walk.params(k) for _, k in others))
  meeting = op.outputs[0].index if data else aligned.meeting
  out = aligned._replace(varies=varies, met=met, meeting=meeting, spread=aligned.spread and not data, chained=True)
  out = out._replace(bent=aligned.bent or curved or own_shift)
  return _chained(op, [out], {weight.params: ((i, weight.scale),)}, walk)


def _of_two_weights(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """Handles a kernel times a gain for each of its columns, or a function of one weight in several parts."""
  if any(kinds[i].meeting is not None for i in weights) or len(weights) > 2 or any(is_data(k) for k in kinds):
    return None
  (i, first), (j, second) = ((i, align(op, i, kinds[i])) for i in weights)
  plain = [k for k in weights if not (kinds[k].chained or kinds[k].bent or kinds[k].gains)]
  if op.name in ('add', 'sub', 'add_any') and len(plain) == 1 and not set(first.params) & set(second.params):
    # For example, a mean plus noise whose spread is another parameter: the noise is a shift for the mean.
    kernel, shift = (first, second) if plain[0] == i else (second, first)
    sign = -1 if op.name == 'sub' and plain[0] == 1 else 1
    return [kernel._replace(scale=sign * kernel.scale, met=kernel.met | shift.met | walk.params(shift))]
  if first.params == second.params:
    if first.axes != second.axes or first._key() != second._key() or first.gains or second.gains:
      return None
    out = first._replace(chained=True, varies=frozenset(first.axes), met=first.met | second.met, bent=True)
    return _chained(op, [out], {first.params: ((i, first.scale), (j, second.scale))}, walk)
  if op.name != 'mul' and not (op.name == 'div' and len(second.axes) < len(first.axes)):
    return None
  if len(first.axes) < len(second.axes):
    (i, first), (j, second) = (j, second), (i, first)
  overlap = set(first.params) & set(second.params) or second.met - set(first.params)
  if not first.covers(op.outputs[0].shape) or overlap or second.gains:
    return None
  out = first._replace(
    chained=True, varies=first.varies | set(second.axes), gains=(*first.gains, second), met=first.met | second.met
  )
  return _chained(op, [out], {first.params: ((i, first.scale),), second.params: ((j, second.scale),)}, walk)


def _chained(op: Op, out: list[Weight], operands: dict, walk: Walk) -> list[Weight]:
  """Notes how the coefficients of weights and of their gains continue, where they are arrays."""
  for v, weight in zip(op.outputs, out, strict=True):
    if weight.chained:
      kernel = operands[weight.params]
      walk.survey.chains[v.index] = {g.params: kernel for g in weight.gains} | operands
  return out


def align(op: Op, i: int, weight: Weight) -> Weight:
  """Returns the weight as an elementwise operation reads it, broadcast to the shape of the result."""
  old, new = op.inputs[i].shape, op.outputs[0].shape
  return weight.broadcast(old, new, tuple(range(len(old)))) if len(old) == len(new) else weight._replace(axes=())


def _add_entrywise(op: Op, position: int, weight: Weight, walk: Walk) -> None:
  aligned = align(op, position, weight).beside_examples()
  if aligned.met or aligned.gains:
    walk.refuse(walk.params(aligned), f'{op.name} (after it was combined with a computed value)', op)
  elif aligned.unique or 0 not in aligned.axes:
    walk.add('entrywise', op, position, aligned)
  else:
    walk.refuse(walk.params(aligned), f'{op.name} (with no leading axis that counts examples)', op)


def _masks(op: Op, i: int, walk: Walk) -> bool:
  """Returns whether the operation sets some entries to zero, as pruning does, and leaves the others unchanged."""
  if op.name == 'select_n':
    return i > 0 and all(is_zero(v, walk) for j, v in enumerate(op.inputs) if j not in (0, i))
  if op.name != 'mul':
    return False
  value = op.inputs[1 - i]
  if isinstance(value, Ref) and value.index in walk.survey.consts:
    known = walk.survey.consts[value.index]
    return is_known(known) and bool(np.isin(known, (0, 1)).all())
  while isinstance(value, Ref) and value.index in walk.survey.makers:
    if value.dtype == jnp.bool_:
      return True
    maker = walk.survey.makers[value.index]
    if maker.name not in (*CASTS, 'broadcast_in_dim', 'reshape'):
      return False
    value = maker.inputs[0]
  return isinstance(value, Ref) and value.dtype == jnp.bool_
