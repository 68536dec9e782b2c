"""Walks a program and notes its sites: the places where parameters meet data, by the meaning of the operations.

A weight is followed through operations that only rearrange or scale it until it meets data (`weight_rules.py`), into
loops, branches and other bodies. Any other meeting is refused, with the parameter, the operation and the line. It is
never treated as something it is not.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ...program import (
  Op,
  Program,
  Ref,
  batch_axes,
  differing,
  has_mark,
  manual_axes,
  manual_devices,
  observe_p,
  scan_split,
  source_line,
)
from ..errors import CurvatureError
from ..operators.weights import Weight
from . import weight_rules
from .sites import DATA, FIXED, INPUT, Derived, Survey, Walk
from .values import constant, holds_mark, is_entrywise


def find_sites(program: Program, n_params: int, from_loss: bool, examples: tuple[int, ...] = ()) -> Survey:
  """Finds the sites of a program whose first `n_params` inputs are the parameters.

  from_loss: whether the curvature comes from the loss itself, not from observed outputs.
  examples: the lengths of the axes that count examples, where they are known.
  """
  walk = Walk(Survey({}, {}, {}, set(), [], {}, {}, {}, {}, set()), {}, from_loss=from_loss, examples=examples)
  _note_readers(program, walk.survey)
  kinds = [Weight.of(i, v.shape) if i < n_params else INPUT for i, v in enumerate(program.inputs)]
  walk.survey.regularisers.update(walk.params(_visit(program, kinds, walk)[0]))
  return walk.survey


def _note_readers(program: Program, survey: Survey) -> None:
  survey.consts.update(program.consts)
  for op in (*program.ops, None):
    for v in program.outputs if op is None else op.inputs:
      if isinstance(v, Ref):
        survey.readers.setdefault(v.index, []).append(op)
  for op in program.ops:
    survey.makers.update((v.index, op) for v in op.outputs)
    for body in op.bodies:
      _note_readers(body, survey)


def _visit(program: Program, inputs: list[Any], walk: Walk) -> list[Any]:
  """Walks one program and returns the kinds of its outputs, with activations settled."""
  walk.kinds.update({i: _kind_of_constant(c, walk) for i, c in program.consts.items()})
  walk.kinds.update({v.index: kind for v, kind in zip(program.inputs, inputs, strict=True)})
  for op in program.ops:
    if op.name == observe_p.name:
      walk.survey.marks.append((op, walk.depth, walk.times))
      kind = weight_rules.settle(op.inputs[0], walk)
      if isinstance(kind, Weight):  # no data met these outputs: every example has a copy
        weight_rules.free(op, 0, kind, walk)
      if isinstance(kind, Derived):
        walk.refuse(kind.params, f'{kind.op.name} (a computed weight), then observed', op)
      _refuse_what_moves(op, walk)
      walk.kinds[op.outputs[0].index] = DATA if walk.params(kind) else kind
      walk.survey.behind.add(op.outputs[0].index)
      continue
    results = weight_rules.straight_through(op, walk) or _region(op, walk) or weight_rules.results(op, walk)
    walk.kinds.update({v.index: kind for v, kind in zip(op.outputs, results, strict=True)})
    if has_mark(op) or any(walk.is_behind(v) for v in op.inputs):
      walk.survey.behind.update(v.index for v in op.outputs)
  return [weight_rules.settle(v, walk) for v in program.outputs]


def _refuse_what_moves(mark: Op, walk: Walk) -> None:
  """Refuses a mark whose variance, weight or arguments have a gradient, as their part of the curvature is unknown."""
  for v in mark.inputs[1:]:
    kind = walk.kind(v)
    if kind == DATA or walk.params(kind):
      raise CurvatureError(
        f'kron.observe at {source_line(mark)}: its variance, weight or what its loss reads besides follows from '
        'parameters, which the curvature would not see; hold it constant by jax.lax.stop_gradient, or mark all outputs '
        'together by kron.observe.loss'
      )


def _kind_of_constant(value: Any, walk: Walk) -> str | None:
  """Returns INPUT for a constant with a row for each example, which may be a batch that the loss closes over."""
  shape = jnp.shape(value)
  return INPUT if shape and (not walk.examples or any(shape[0] % n == 0 for n in walk.examples)) else None


def _region(op: Op, walk: Walk) -> list[Any] | None:
  """Returns the kinds of the results of an operation with bodies, or None if its bodies need no walk."""
  if op.region is None or (is_entrywise(op) and not op.plain):
    return None
  inputs = [walk.kind(v) for v in op.inputs]
  marked = any(holds_mark(body) for body in op.bodies)
  if not marked and not any(isinstance(k, Weight | Derived) for k in inputs):
    return None
  inputs = [weight_rules.settle(v, walk, whole=True) for v in op.inputs]
  _hand_on_constants(op, walk)
  if op.region == 'scan':
    return _scan(op, inputs, walk)
  if op.region == 'cond' and marked:
    raise CurvatureError(
      f'an output is observed inside of a branch at {source_line(op)}; move the mark behind the branches'
    )
  if op.region == 'cond':
    branches = [_visit(body, inputs[1:], walk) for body in op.bodies]
    return [_join(list(kinds), op, walk) for kinds in zip(*branches, strict=True)]
  if op.region == 'shard_map':
    spread = dict(walk.spread)
    for i, (kind, spec) in enumerate(zip(inputs, op.params['in_specs'], strict=True)):
      if (
        isinstance(kind, Weight) and 0 in kind.axes and isinstance(spec[0] if spec else None, str) and not any(spec[1:])
      ):
        # Each device has some of the layers. Seen from outside, the loop that slices them runs over all layers.
        spread |= dict.fromkeys(walk.params(kind), spec[0])
      elif walk.params(kind) and any(spec):
        walk.refuse(walk.params(kind), f'shard_map (split over the mesh by {spec})', op)
        inputs[i] = DATA
    # Along axes that split no operand's leading axis, examples stay whole and each device has some of their places.
    examples = set(batch_axes(op)) - set(spread.values())
    places = walk.places | (manual_axes(op) - examples)
    unchecked = frozenset() if op.params['check_vma'] else manual_axes(op)
    walk = walk._replace(unchecked=walk.unchecked | unchecked, differs={**walk.differs, **differing(op)})
    walk = walk._replace(
      spread=spread, sharded=walk.sharded or bool(examples), places=places, times=walk.times * manual_devices(op)
    )
  results = _visit(op.bodies[0], inputs, walk)
  if op.region == 'shard_map':
    _refuse_unstacked(walk)
  # The coefficient of a scaled weight and the effect of a mesh on a weight are not known outside of the body.
  plain = op.region == 'remat' or op.plain
  return [k if not isinstance(k, Weight) or (plain and not k.chained) else Derived(walk.params(k), op) for k in results]


def _hand_on_constants(op: Op, walk: Walk) -> None:
  """Notes which values of bodies are constants of the program, such as masks and orders.

  A constant that a shard_map divides differs between devices, so it is not handed on.
  """
  specs = op.params['in_specs'] if op.region == 'shard_map' else ((),) * len(op.inputs)
  last = scan_split(op)[0] if op.region == 'scan' else len(op.inputs)
  for body in op.bodies:
    offset = len(op.inputs) - len(body.inputs)
    for v, inner, spec in zip(op.inputs[offset:last], body.inputs, specs[offset:last], strict=False):
      if any(spec):
        continue
      known = walk.survey.consts.get(v.index) if isinstance(v, Ref) else v
      known = constant(v, walk) if known is None else known
      if known is not None:
        walk.survey.consts[inner.index] = known


def _refuse_unstacked(walk: Walk) -> None:
  """Refuses parameters that are split over the mesh by layers and used outside of the loop over these layers."""
  for sites in walk.survey.sites.values():
    for site in sites:
      if site.spread is not None and not site.weight.stack:
        reason = f'shard_map (split over {site.spread!r}, and not by layers of a loop)'
        walk.refuse(walk.survey.owners(site.weight), reason, site.op)


def _scan(op: Op, inputs: list[Any], walk: Walk) -> list[Any]:
  (body,) = op.bodies
  n_consts, n_carry = scan_split(op)
  for i in range(n_consts, n_consts + n_carry):
    unchanged = body.outputs[i - n_consts] is body.inputs[i]
    if isinstance(inputs[i], Weight) and not unchanged:  # a learned initial state
      weight_rules.free(op, i, inputs[i], walk)
      inputs[i] = DATA
  for i in range(n_consts + n_carry, len(inputs)):
    if isinstance(inputs[i], Weight):
      inputs[i] = inputs[i].sliced_by_loop(walk.depth)
  inner = walk._replace(depth=walk.depth + 1, times=walk.times * op.params['length'])
  while True:
    results = _visit(body, inputs, inner._replace(survey=(trial := walk.survey.copy())))
    carried = inputs[n_consts : n_consts + n_carry]
    met = [
      a if isinstance(a, Weight) else _join([a, b], op, inner._replace(survey=trial))
      for a, b in zip(carried, results, strict=False)
    ]
    if met == carried:
      break
    inputs[n_consts : n_consts + n_carry] = met
  _replace(walk.survey, trial)
  return [*carried, *(Derived(walk.params(k), op) if isinstance(k, Weight) else k for k in results[n_carry:])]


def _replace(survey: Survey, other: Survey) -> None:
  """Replaces the findings of a survey with those of another that began as its copy."""
  for mine, theirs in ((survey.sites, other.sites), (survey.chains, other.chains), (survey.refusals, other.refusals)):
    mine.clear()
    mine.update(theirs)
  survey.regularisers.update(other.regularisers)
  survey.marks[:] = other.marks


def _join(kinds: list[Any], op: Op, walk: Walk) -> Any:
  """Returns the kind of a value that may be of any of these kinds."""
  params = frozenset().union(*(walk.params(k) for k in kinds))
  if DATA in kinds:
    if not op.outputs[0].shape:
      walk.survey.regularisers.update(params)
    walk.refuse(params, f'{op.name} (beside data)', op)
    return DATA
  if params:
    return Derived(params, next((k.op for k in kinds if isinstance(k, Derived)), op))
  return next((k for k in (INPUT, FIXED) if k in kinds), None)
