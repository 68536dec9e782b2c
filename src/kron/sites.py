"""Finds the sites: where each parameter of a program meets data, by what the operations mean.

Every value is one of four things: a constant of the program (None here), `DATA` (inputs, activations), a `Weight` (linear
in one parameter) or `Derived` (any other function of parameters alone). A weight is followed through casts, reshapes,
transposes, broadcasts and scalings until it meets data. What is met otherwise is refused, with the parameter, the
operation and the line, and never treated as something it is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .operators import LINEAR, Conv, Dense
from .program import Op, Program, Ref, observe_p, source_line
from .weights import Weight

DATA = 'data'


class Derived(NamedTuple):
  """A function of these parameters alone, such as an L2 term; `op` is the first step that was not followed."""

  params: frozenset[int]
  op: Op


class Site(NamedTuple):
  """One use of a parameter: the operation, the operand that holds the weight, and the weight as it looks there."""

  kind: str  # 'linear', 'scale' or 'shift'
  op: Op
  position: int
  weight: Weight
  linear: Dense | Conv | None = None

  @property
  def key(self) -> int:
    return self.op.outputs[0].index

  @property
  def features(self) -> tuple[int, ...]:
    """The axes of the result that come from the parameter."""
    return self.linear.features if self.linear else self.weight.channels()


class Refusal(NamedTuple):
  """A use of a parameter that is not understood."""

  reason: str
  line: str


class Survey(NamedTuple):
  """What `survey` found.

  sites: by key.
  biases: the key of a linear or scale site -> the shift site added to its result, and the axes of the sum that are the
    first site's features, in their order.
  chains: every step of a weight that met arrays: output index -> (operation, operand). From them its coefficient is had.
  refusals: by parameter.
  regularisers: the parameters with a term of their own in the loss.
  marks: the observation marks, in order.
  """

  sites: dict[int, Site]
  biases: dict[int, tuple[Site, tuple[int, ...]]]
  chains: dict[int, tuple[Op, int]]
  refusals: dict[int, Refusal]
  regularisers: set[int]
  marks: list[Op]


_CASTS = ('convert_element_type', 'reduce_precision', 'copy', 'copy_p', 'optimization_barrier', 'sharding_constraint')


def survey(program: Program, n_params: int) -> Survey:
  """The sites of a program whose first `n_params` inputs are the parameters."""
  walk = _Walk(Survey({}, {}, {}, {}, set(), []), {}, {}, {})
  for i, v in enumerate(program.inputs):
    walk.kinds[v.index] = Weight.of(i, v.shape) if i < n_params else DATA
  _visit(program, walk)
  for v in program.outputs:
    walk.found.regularisers.update(_params(walk.kind(v)))
  _pair_biases(program, walk)
  return walk.found


class _Walk(NamedTuple):
  """What the walk knows so far; every dictionary is keyed by a value's index."""

  found: Survey
  kinds: dict[int, Any]
  makers: dict[int, Op]
  readers: dict[int, list[Op | None]]  # None: an output of the program or of a rematerialised region

  def kind(self, value: Any) -> Any:
    return self.kinds.get(value.index) if isinstance(value, Ref) else None


def _visit(program: Program, walk: _Walk) -> None:
  walk.kinds.update(dict.fromkeys(program.consts, DATA))
  for op in (*program.ops, None):
    for v in program.outputs if op is None else op.inputs:
      if isinstance(v, Ref):
        walk.readers.setdefault(v.index, []).append(op)
  for op in program.ops:
    if op.body is not None:
      for inner, outer in zip(op.body.inputs, op.inputs, strict=True):
        walk.kinds[inner.index] = _settle(walk.kind(outer), walk)
      _visit(op.body, walk)
      results = [walk.kind(v) for v in op.body.outputs]
    else:
      if op.name == observe_p.name:
        walk.found.marks.append(op)
      results = [_result(op, walk)] * len(op.outputs)
    for v, kind in zip(op.outputs, results, strict=True):
      walk.kinds[v.index], walk.makers[v.index] = kind, op
  for v in program.outputs:
    if isinstance(v, Ref):
      walk.kinds[v.index] = _settle(walk.kind(v), walk)


def _params(kind: Any) -> frozenset[int]:
  if isinstance(kind, Weight):
    return frozenset([kind.param])
  return kind.params if isinstance(kind, Derived) else frozenset()


def _settle(kind: Any, walk: _Walk, spread: bool = False) -> Any:
  """A weight that met data becomes data: its last multiplication is the site.

  spread: whether what reads it repeats it, so that the gradients of several examples have been added up there.
  """
  if not (isinstance(kind, Weight) and kind.met):
    return kind
  op = walk.makers[kind.meeting]
  position = next(i for i, v in enumerate(op.inputs) if kind.param in _params(walk.kind(v)))
  if kind.spread or spread:
    _refuse(kind.param, f'{op.name} (with data that is repeated later)', op, walk.found)
  elif kind.meeting not in walk.found.sites:
    _add_site(Site('scale', op, position, _aligned(op, position, walk.kind(op.inputs[position]))), walk.found)
  return DATA


def _repeats(op: Op, i: int) -> bool:
  """Whether an operation on arrays of one rank repeats its operand along axes of length one."""
  value, shape = op.inputs[i], op.outputs[0].shape if op.outputs else ()
  if not isinstance(value, Ref) or len(value.shape) != len(shape) or op.name in ('dot_general', 'conv_general_dilated'):
    return False
  return any(old == 1 != new for old, new in zip(value.shape, shape, strict=True))


def _aligned(op: Op, i: int, weight: Weight) -> Weight:
  """The weight as it takes part in an elementwise operation, repeated to the shape of the result."""
  return weight.broadcast(op.inputs[i].shape, op.outputs[0].shape, tuple(range(len(op.outputs[0].shape))))


def _result(op: Op, walk: _Walk) -> Any:
  """What the results of an operation are; notes the sites and refusals it finds on the way."""
  inputs = [walk.kind(v) for v in op.inputs]
  weights = [i for i, kind in enumerate(inputs) if isinstance(kind, Weight)]
  # An activation that several operations read is the site's result itself; none of them multiplies the weight further.
  if len(weights) == 1 and not (inputs[weights[0]].met and len(walk.readers[op.inputs[weights[0]].index]) > 1):
    (i,) = weights
    others = [kind for j, kind in enumerate(inputs) if j != i]
    followed = _moved(op, i, inputs[i]) or _scaled(op, i, inputs[i], others)
    if followed is not None:
      if followed.met:
        walk.found.chains[op.outputs[0].index] = (op, i)
      return followed
    if not inputs[i].met and all(kind == DATA for kind in others):
      site = _site(op, i, inputs[i])
      if site is not None:
        _add_site(site, walk.found)
        return DATA
  settled = [_settle(kind, walk, _repeats(op, i)) for i, kind in enumerate(inputs)]
  if settled != inputs:
    # One of two weights was an activation: the other one meets it here.
    walk.kinds.update({v.index: k for v, k in zip(op.inputs, settled, strict=True) if isinstance(v, Ref)})
    return _result(op, walk)
  params = frozenset().union(*(_params(kind) for kind in inputs))
  if not params:
    return DATA if DATA in inputs else None
  if DATA not in inputs:
    return Derived(params, next((kind.op for kind in inputs if isinstance(kind, Derived)), op))
  if op.name in ('add', 'sub', 'add_any') and not op.outputs[0].shape:  # the loss plus an L2 term
    walk.found.regularisers.update(params)
    return DATA
  for kind in inputs:
    for param in _params(kind):
      what = op.name if isinstance(kind, Weight) else f'{kind.op.name} (a computed weight), then {op.name}'
      _refuse(param, what, op, walk.found)
  return DATA


def _moved(op: Op, i: int, weight: Weight) -> Weight | None:
  """The weight after an operation that only rearranges, repeats or casts it, else None."""
  if op.name in _CASTS and len(op.inputs) == 1:
    return weight
  if op.name == 'transpose':
    return weight.transposed(op.params['permutation'])
  if i:
    return None
  old, new = op.inputs[i].shape, op.outputs[0].shape
  if op.name == 'broadcast_in_dim':
    return weight.broadcast(old, new, op.params['broadcast_dimensions'])
  if op.name == 'squeeze' or (op.name == 'reshape' and op.params['dimensions'] is None):
    return weight.reshaped(old, new)
  return None


def _scaled(op: Op, i: int, weight: Weight, others: list[Any]) -> Weight | None:
  """The weight after a multiplication entry by entry or the addition of a constant, else None."""
  if op.name == 'neg':
    return weight if weight.met else weight._replace(scale=-weight.scale)
  if len(op.inputs) != 2 or len(op.inputs[i].shape) != len(op.outputs[0].shape):
    return None
  other, weight = op.inputs[1 - i], _aligned(op, i, weight)
  if op.name == 'mul' or (op.name == 'div' and i == 0):
    if isinstance(other, Ref):
      met = others[0] is None or others[0] == DATA
      return weight._replace(met=weight.met + 1, meeting=op.outputs[0].index, spread=False) if met else None
    if not weight.met:
      number = float(other)
      return weight._replace(scale=weight.scale * number if op.name == 'mul' else weight.scale / number)
    return weight
  if others == [None] and (op.name == 'add' or (op.name == 'sub' and i == 0)):  # such as 1 + w
    return weight
  return None


def _site(op: Op, i: int, weight: Weight) -> Site | None:
  """The site where a weight meets data in this operation, if it is one we know."""
  for operator in LINEAR:
    linear = operator.recognise(op, i, weight)
    if linear is not None:
      return Site('linear', op, i, weight, linear)
  if op.name in ('add', 'sub', 'add_any') and op.outputs[0].shape:
    sign = -1 if op.name == 'sub' and i == 1 else 1
    return Site('shift', op, i, _aligned(op, i, weight)._replace(scale=sign * weight.scale))
  return None


def _add_site(site: Site, found: Survey) -> None:
  """Notes the site, or refuses the parameter where it is used twice or where no axis counts examples."""
  param = site.weight.param
  first = next((s for s in found.sites.values() if s.weight.param == param), None)
  if first is not None:
    _refuse(param, f'{site.op.name} (a second use; the first is at {source_line(first.op)})', site.op, found)
  elif site.kind != 'linear' and (not site.op.outputs[0].shape or site.weight.dims[0] is not None):
    _refuse(param, f'{site.op.name} (with no leading axis that counts examples)', site.op, found)
  else:
    found.sites[site.key] = site


def _refuse(param: int, reason: str, op: Op, found: Survey) -> None:
  found.refusals.setdefault(param, Refusal(reason, source_line(op)))


def _pair_biases(program: Program, walk: _Walk) -> None:
  """Notes which shift is added to which site's result, directly or after casts and transposes."""
  for op in program.ops:
    if op.body is not None:
      _pair_biases(op.body, walk)
    site = walk.found.sites.get(op.outputs[0].index) if op.outputs else None
    if site is not None and site.kind != 'shift':
      shift, axes = _shift_after(site, walk)
      if shift is not None and _runs_along(shift, axes):
        walk.found.biases[site.key] = (shift, axes)


def _shift_after(site: Site, walk: _Walk) -> tuple[Site | None, tuple[int, ...]]:
  """The shift added to the result of a site that nothing else reads, and where the site's features are there."""
  value, axes = site.op.outputs[0], site.features
  while True:
    following = walk.readers.get(value.index, [])
    if len(following) != 1 or following[0] is None:
      return None, axes
    (op,) = following
    if op.name == 'transpose':
      axes = tuple(op.params['permutation'].index(a) for a in axes)
    elif op.name not in ('convert_element_type', 'copy', 'copy_p'):
      shift = walk.found.sites.get(op.outputs[0].index) if op.outputs else None
      return (shift if shift is not None and shift.kind == 'shift' else None), axes
    value = op.outputs[0]


def _runs_along(shift: Site, axes: tuple[int, ...]) -> bool:
  """Whether the shift is plain and has one entry for each index along these axes."""
  if shift.op.name == 'sub' or shift.weight.scale != 1:
    return False
  shape = shift.op.outputs[0].shape
  return {a for a in shift.weight.channels() if shape[a] != 1} == {a for a in axes if shape[a] != 1}
