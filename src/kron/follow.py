"""Rules for one operation: how it moves, joins or scales a weight, and where it makes the weight meet data."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from .operators import LINEAR, Dense, Linear
from .program import Op, Program, Ref, bind, concrete, has_mark, is_known
from .sites import DATA, INPUT, Derived, Walk
from .weights import Weight, joined

_CASTS = ('convert_element_type', 'reduce_precision', 'copy', 'copy_p', 'optimization_barrier', 'sharding_constraint',
          'pvary', 'pcast', 'mesh_cast', 'reshard')  # fmt: skip
# fmt: off
_ENTRYWISE = frozenset((
  'abs', 'add', 'add_any', 'asin', 'asinh', 'atan', 'atan2', 'atanh', 'acos', 'acosh', 'cbrt', 'ceil', 'clamp', 'copy',
  'cos', 'cosh', 'convert_element_type', 'digamma', 'div', 'eq', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor',
  'ge', 'gt', 'imag', 'integer_pow', 'is_finite', 'le', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul',
  'ne', 'neg', 'nextafter', 'not', 'and', 'or', 'xor', 'pow', 'real', 'rem', 'round', 'rsqrt', 'select_n', 'sign', 'sin',
  'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh',
))
# fmt: on
_MOVES = ('slice', 'rev', 'dynamic_slice', 'gather', 'split', 'pad')


def results(op: Op, walk: Walk) -> list[Any]:
  """The kinds of an operation's results; notes the sites and refusals it finds on the way."""
  if op.name == 'stop_gradient' or (op.outputs and not any(_differentiable(v) for v in op.outputs)):
    return [INPUT if any(walk.kind(v) is not None for v in op.inputs) else None] * len(op.outputs)
  kinds = [walk.kind(v) for v in op.inputs]
  weights = [i for i, kind in enumerate(kinds) if isinstance(kind, Weight)]
  for rule in (_moved, _joined, _entrywise, _linear) if weights else ():
    found = rule(op, kinds, weights, walk)
    if found is not None:
      return found
  settled = [settle(v, walk) for v in op.inputs]
  if settled != kinds:
    return results(op, walk)  # one of two weights was an activation: the other one meets it here
  if weights and any(_is_data(k) for k in kinds):
    for i in weights:
      if _may_be_free(op.inputs[i], kinds[i]):
        free(op, i, kinds[i], walk)
        kinds[i] = DATA
  return [_met(op, kinds, walk)] * len(op.outputs)


def _met(op: Op, kinds: list[Any], walk: Walk) -> Any:
  """The kind of a result where no rule applies; refuses the parameters that met data without one."""
  params = frozenset().union(*(walk.params(kind) for kind in kinds))
  if not params:
    return DATA if DATA in kinds else INPUT if INPUT in kinds else None
  if op.name == 'while':
    walk.refuse(
      params, 'while (a loop whose length is not known has no reverse mode; give fori_loop constant bounds)', op
    )
    return DATA
  step = next((kind.op for kind in kinds if isinstance(kind, Derived)), op)
  scalar = bool(op.outputs) and not op.outputs[0].shape
  if not any(_is_data(k) for k in kinds):
    return Derived(params, step)
  if DATA not in kinds and (scalar or (op.name in _ENTRYWISE and not walk.from_loss)):
    # A weighted L2 term, or one that compares with old parameters; were it an output, its mark would refuse it.
    return Derived(params, step)
  if op.name in ('add', 'sub', 'add_any') and scalar:  # the loss plus an L2 term, unless it goes into an output
    walk.found.regularisers.update(params)
    if walk.from_loss and not walk.depth:
      return DATA
  for kind in kinds:
    what = f'{kind.op.name} (a computed weight), then {op.name}' if isinstance(kind, Derived) else op.name
    walk.refuse(walk.params(kind), what, op)
  return DATA


def settle(value: Any, walk: Walk, whole: bool = False) -> Any:
  """The kind of a value that is read as a result: a weight that met data entry by entry is an activation.

  Its last meeting is the site. whole: leave it where it could be a kernel scaled by data.
  """
  kind = walk.kind(value)
  if not isinstance(kind, Weight) or kind.meeting is None or (whole and kind.covers(value.shape)):
    return kind
  op = walk.found.makers[kind.meeting]
  if kind.spread:
    walk.refuse(walk.params(kind), f'{op.name} (with data that is repeated later)', op)
  elif not any(site.weight.params == kind.params for site in walk.found.sites.get(kind.meeting, ())):
    position = next(i for i, v in enumerate(op.inputs) if getattr(walk.kind(v), 'params', None) == kind.params)
    _add_entrywise(op, position, walk.kind(op.inputs[position]), walk)
  walk.kinds[value.index] = DATA
  return DATA


def free(op: Op, position: int, weight: Weight, walk: Walk) -> None:
  """Notes a parameter of which every example has a copy at this operand."""
  if weight.met or weight.gains:
    walk.refuse(walk.params(weight), f'{op.name} (after it was combined with a computed value)', op)
  elif not _may_be_free(op.inputs[position], weight):
    walk.refuse(walk.params(weight), f'{op.name} (with no leading axis that counts examples)', op)
  else:
    walk.add('free', op, position, weight)


def _may_be_free(value: Any, weight: Weight) -> bool:
  return bool(value.shape) and 0 not in weight.axes and weight.meeting is None


def _is_data(kind: Any) -> bool:
  return kind in (DATA, INPUT)


def _differentiable(v: Ref) -> bool:
  return jnp.issubdtype(v.dtype, jnp.inexact)


# --- rearrangements


def _moved(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """After an operation that only rearranges, repeats or casts one weight."""
  if weights != [0] or (kinds[0].meeting is not None and not walk.read_once(op.inputs[0])):
    return None
  value, weight = op.inputs[0], kinds[0]
  old, new = value.shape, op.outputs[0].shape
  if op.name in _CASTS:
    out = [weight] * len(op.outputs)
  elif op.name == 'transpose':
    out = [weight.transposed(op.params['permutation'])]
  elif op.name == 'broadcast_in_dim':
    out = [weight.broadcast(old, new, op.params['broadcast_dimensions'])]
  elif op.name == 'tile' and all(a in (1, b) for a, b in zip(old, new, strict=True)):
    out = [weight.broadcast(old, new, tuple(range(len(old))))]
  elif op.name in ('squeeze', 'expand_dims', 'reshape'):
    first = op.params.get('dimensions') if op.name == 'reshape' else None  # a transposition on the way
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
  """After an operation that picks entries at places that the program itself knows."""
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
  if any(v is None for v in rest) or (
    new[:1] == (walk.examples,) and any(_closed_over(v, walk) for v in op.inputs[1:])
  ):
    return [None]
  described = (str(sorted((k, str(v)) for k, v in op.params.items())), tuple(str(v) for v in rest))
  apply = lambda x: bind(op, x, *(v.astype(x.dtype) if op.name == 'pad' else v for v in rest))[0]  # noqa: E731
  if op.name in ('slice', 'rev'):
    return [weight.picked(old, new, op.name, described, apply)]
  if len(weight.axes) < len(old) or weight.stack:
    return [None]
  picked = weight._then(op.name, described, apply, new)
  return [picked._replace(axes=tuple(range(len(new))), unique=op.name == 'dynamic_slice')]


def constant(value: Any, walk: Walk) -> Any:
  """The number that the program itself gives this value, or None."""
  if not isinstance(value, Ref):
    return jnp.asarray(value)
  if value.index in walk.found.consts:
    known = walk.found.consts[value.index]
    return jnp.asarray(known) if is_known(known) and not _differentiable(value) else None
  op = walk.found.makers.get(value.index)
  if op is None or _differentiable(value) or op.region is not None or len(op.outputs) > 1:
    return None
  operands = [constant(v, walk) for v in op.inputs]
  return None if any(v is None for v in operands) else concrete(op, operands)[0]


def _closed_over(value: Any, walk: Walk) -> bool:
  """Whether an array that the program holds takes part in a constant: it may be the batch's."""
  if not isinstance(value, Ref) or value.index in walk.found.consts:
    return isinstance(value, Ref)
  op = walk.found.makers.get(value.index)
  return op is None or any(_closed_over(v, walk) for v in op.inputs)


def _joined(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """After a concatenation of weights alone."""
  if op.name not in ('concatenate', 'stack') or len(weights) < len(kinds) or len(weights) < 2:
    return None
  args = tuple(sorted((k, str(v)) for k, v in op.params.items()))
  weight = joined(kinds, op.name, args, lambda *x: bind(op, *x)[0], op.outputs[0].shape)
  return None if weight is None else [weight]


# --- entry by entry


def is_entrywise(op: Op) -> bool:
  """Whether each entry of the result depends on the same entry of the operands only."""
  if op.name == 'custom_jvp_call':
    return all(is_entrywise(inner) for inner in op.bodies[0].ops)
  return op.name in _ENTRYWISE


def holds_mark(program: Program) -> bool:
  return any(has_mark(op) for op in program.ops)


def _entrywise(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """After an operation entry by entry: scaled further, or met by data."""
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
  data = [k for _, k in others if _is_data(k)]
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
    if op.name in ('add', 'sub', 'add_any') and others[0][1] is None:  # such as 1 + w
      return [aligned._replace(scale=-weight.scale if op.name == 'sub' and i == 1 else weight.scale)]
  if data and not scaling:
    if data == [INPUT] * len(data) and 0 in aligned.axes:
      return None  # compared with an array of its own shape, such as its old value
    if weight.meeting is not None:
      return None  # scaled already: an activation
    _add_entrywise(op, i, weight, walk)
    return [DATA]
  varies = aligned.varies
  if scaling:
    varies |= {a for v, _ in others for a in _varying_axes(v, walk) if a < len(shape)}
  elif op.name not in ('neg', 'add', 'sub', 'add_any', *_CASTS):
    varies |= set(aligned.axes)
  curved = not scaling and op.name not in ('neg', 'add', 'sub', 'add_any', *_CASTS)
  own_shift = not scaling and any(walk.params(k) & walk.params(weight) for _, k in others)
  met = aligned.met.union(*(walk.params(k) for _, k in others))
  meeting = op.outputs[0].index if data else aligned.meeting
  out = aligned._replace(varies=varies, met=met, meeting=meeting, spread=aligned.spread and not data, chained=True)
  out = out._replace(bent=aligned.bent or curved or own_shift)
  return _chained(op, [out], {weight.params: ((i, weight.scale),)}, walk)


def _of_two_weights(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """A kernel times a gain for each of its columns, or a function of one weight written in several parts."""
  if any(kinds[i].meeting is not None for i in weights) or len(weights) > 2 or any(_is_data(k) for k in kinds):
    return None
  (i, first), (j, second) = ((i, align(op, i, kinds[i])) for i in weights)
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
  """Notes how the coefficient of a weight, and of its gains, goes on, where it is an array."""
  for v, weight in zip(op.outputs, out, strict=True):
    if weight.chained:
      kernel = operands[weight.params]
      walk.found.chains[v.index] = {g.params: kernel for g in weight.gains} | operands
  return out


def align(op: Op, i: int, weight: Weight) -> Weight:
  """The weight as it takes part in an operation entry by entry, repeated to the shape of the result."""
  old, new = op.inputs[i].shape, op.outputs[0].shape
  return weight.broadcast(old, new, tuple(range(len(old)))) if len(old) == len(new) else weight._replace(axes=())


def _add_entrywise(op: Op, position: int, weight: Weight, walk: Walk) -> None:
  aligned = align(op, position, weight)
  if aligned.met or aligned.gains:
    walk.refuse(walk.params(aligned), f'{op.name} (after it was combined with a computed value)', op)
  elif aligned.unique or 0 not in aligned.axes:
    walk.add('entrywise', op, position, aligned)
  else:
    walk.refuse(walk.params(aligned), f'{op.name} (with no leading axis that counts examples)', op)


def _masks(op: Op, i: int, walk: Walk) -> bool:
  """Whether the operation sets some entries to zero, as pruning does, and leaves the others as they are."""
  if op.name == 'select_n':
    return i > 0 and all(_is_zero(v, walk) for j, v in enumerate(op.inputs) if j not in (0, i))
  if op.name != 'mul':
    return False
  value = op.inputs[1 - i]
  if isinstance(value, Ref) and value.index in walk.found.consts:
    known = walk.found.consts[value.index]
    return is_known(known) and bool(np.isin(known, (0, 1)).all())
  while isinstance(value, Ref) and value.index in walk.found.makers:
    if value.dtype == jnp.bool_:
      return True
    maker = walk.found.makers[value.index]
    if maker.name not in (*_CASTS, 'broadcast_in_dim', 'reshape'):
      return False
    value = maker.inputs[0]
  return isinstance(value, Ref) and value.dtype == jnp.bool_


def _is_zero(value: Any, walk: Walk) -> bool:
  if not isinstance(value, Ref):
    return not np.any(value)
  op = walk.found.makers.get(value.index)
  return op is not None and op.name in (*_CASTS, 'broadcast_in_dim') and _is_zero(op.inputs[0], walk)


def _varying_axes(value: Any, walk: Walk) -> set[int]:
  """The axes along which an array's entries may differ."""
  if not isinstance(value, Ref):
    return set()
  long = {a for a, size in enumerate(value.shape) if size != 1}
  op = walk.found.makers.get(value.index)
  if op is None or not long:
    return long
  if op.name == 'broadcast_in_dim':
    dims, old = (
      op.params['broadcast_dimensions'],
      jnp.shape(op.inputs[0]) if not isinstance(op.inputs[0], Ref) else op.inputs[0].shape,
    )
    return {dims[a] for a in _varying_axes(op.inputs[0], walk) if old[a] == value.shape[dims[a]]}
  if is_entrywise(op) and all(not isinstance(v, Ref) or len(v.shape) in (0, len(value.shape)) for v in op.inputs):
    return set().union(*(_varying_axes(v, walk) for v in op.inputs))
  return long


# --- linear operations


def _linear(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """Where a kernel meets data in a linear operation."""
  others = {k for j, k in enumerate(kinds) if j != weights[0]} if len(weights) == 1 else {DATA, None}
  if others == {None}:
    return _lifted(op, weights[0], kinds[weights[0]], walk)
  if not others <= {DATA, INPUT}:
    return None
  i, weight = weights[0], kinds[weights[0]]
  for operator in LINEAR:
    linear = operator.recognise(op, i, weight)
    if linear is None:
      continue
    if isinstance(linear, Dense) and _is_one_hot(op.inputs[1 - i], linear.input_axes[2], walk):
      linear = linear._replace(one_hot=True)
    if weight.bent:
      walk.refuse(walk.params(weight), f'{op.name} (with a kernel that is no multiple of the parameter)', op)
      return [DATA] * len(op.outputs)
    if weight.chained and not (weight.covers(op.inputs[i].shape) and _separable(linear, weight)):
      if weight.meeting is not None and min(linear.n_in, linear.n_out) == 1:
        return None  # an activation
      walk.refuse(walk.params(weight), f'{op.name} (with a kernel that was scaled along rows and columns)', op)
      return [DATA] * len(op.outputs)
    walk.refuse(weight.met - set(weight.params), f'{op.name} (as a part of a computed weight)', op)
    if weight.params[0] < 0:
      return None
    walk.add('linear', op, i, weight, linear)
    for gain in weight.gains:
      walk.add('gain', op, i, gain, linear)
    return [DATA] * len(op.outputs)
  return None


def _lifted(op: Op, i: int, weight: Weight, walk: Walk) -> list[Any] | None:
  """Where a kernel meets a constant, such as the direction of a derivative: the product is what examples meet later."""
  found = [operator.recognise(op, i, weight) for operator in LINEAR[:2]]
  linear = next((f for f in found if f is not None), None)
  if linear is None or weight.chained or weight.params[0] < 0:
    return None
  number = -op.outputs[0].index
  walk.found.lifted[number] = walk.site('lifted', op, i, weight, linear)
  return [Weight.of(number, op.outputs[0].shape)]


def _separable(linear: Linear, weight: Weight) -> bool:
  """Whether the kernel's coefficient varies along rows only or along columns (and slots) only."""
  if weight.gains:
    return weight.varies <= set(linear.column_axes)
  return weight.varies <= set(linear.row_axes) or weight.varies <= set(linear.column_axes)


def _is_one_hot(value: Any, axes: tuple[int, ...], walk: Walk) -> bool:
  """Whether data are one-hot along an axis: made by a comparison with the numbers of that axis."""
  if len(axes) != 1 or not isinstance(value, Ref):
    return False
  (axis,) = axes
  op = walk.found.makers.get(value.index)
  while op is not None and op.name in _CASTS:
    op = walk.found.makers.get(op.inputs[0].index)
  if op is None or op.name != 'eq':
    return False
  counts = [_counts(v, axis, walk) for v in op.inputs]
  fixed = [axis not in _varying_axes(v, walk) for v in op.inputs]
  return (counts[0] and fixed[1]) or (counts[1] and fixed[0])


def _counts(value: Any, axis: int, walk: Walk) -> bool:
  """Whether a value is 0, 1, 2... along an axis."""
  op = walk.found.makers.get(value.index) if isinstance(value, Ref) else None
  if op is None:
    return False
  if op.name == 'iota':
    return op.params['dimension'] == axis
  if op.name == 'broadcast_in_dim' and axis in op.params['broadcast_dimensions']:
    return _counts(op.inputs[0], op.params['broadcast_dimensions'].index(axis), walk)
  return op.name in _CASTS and _counts(op.inputs[0], axis, walk)
