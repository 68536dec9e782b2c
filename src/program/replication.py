"""The mesh axes along which values in a shard_map differ, where JAX does not keep track (check_vma=False)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from .binding import varying
from .ops import Op, Program, Ref
from .regions import scan_split

Axes = frozenset[str]
_SAME: Axes = frozenset()
_REDUCTIONS = ('psum', 'psum2', 'psum_invariant', 'pmax', 'pmin', 'pmean', 'all_gather', 'all_gather_invariant')


def differing(op: Op) -> dict[int, Axes]:
  """Returns the axes along which each value of a shard_map's body may differ, by the value's index."""
  axes_of: dict[int, Axes] = {}
  (body,) = op.bodies
  _visit(body, [_axes_of(spec) for spec in op.params['in_specs']], axes_of)
  return axes_of


def reduced_behind(program: Program, marks: Sequence[Op]) -> Axes:
  """Returns the mesh axes over which a program reduces values that depend on marked outputs."""
  after, reduced = {v.index for mark in marks for v in mark.outputs}, _SAME
  for op in program.ops:
    if any(v.index in after for v in op.inputs if isinstance(v, Ref)):
      after |= {v.index for v in op.outputs}
      reduced |= _reductions(op)
  return reduced


def _reductions(op: Op) -> Axes:
  axes = _named(op) if op.name in _REDUCTIONS else _SAME
  return axes.union(*(_reductions(inner) for body in op.bodies for inner in body.ops))


def untracked(axes: Axes) -> Axes:
  """Returns the given axes that are manual here and along which JAX does not track differences (check_vma=False)."""
  manual = axes & frozenset(jax.sharding.get_abstract_mesh().manual_axes)
  return frozenset(axis for axis in manual if not varying(jax.lax.axis_index(axis)))


def _axes_of(spec: Any) -> Axes:
  """Returns the mesh axes in a PartitionSpec."""
  parts = [part if isinstance(part, tuple) else (part,) for part in spec]
  return frozenset(axis for part in parts for axis in part if isinstance(axis, str))


def _visit(program: Program, inputs: Sequence[Axes], axes_of: dict[int, Axes]) -> list[Axes]:
  """Notes the axes of one program's values and returns those of its outputs."""
  for v, axes in zip(program.inputs, inputs, strict=True):
    axes_of[v.index] = axes_of.get(v.index, _SAME) | axes
  for op in program.ops:
    results = _results(op, [_of(v, axes_of) for v in op.inputs], axes_of)
    for v, axes in zip(op.outputs, results, strict=True):
      axes_of[v.index] = axes_of.get(v.index, _SAME) | axes
  return [_of(v, axes_of) for v in program.outputs]


def _of(value: Any, axes_of: Mapping[int, Axes]) -> Axes:
  return axes_of.get(value.index, _SAME) if isinstance(value, Ref) else _SAME


def _results(op: Op, inputs: list[Axes], axes_of: dict[int, Axes]) -> list[Axes]:
  union = _SAME.union(*inputs)
  if op.region == 'scan':
    consts, carried = scan_split(op)
    while True:
      results = _visit(op.bodies[0], inputs, axes_of)
      met = [a | b for a, b in zip(inputs[consts : consts + carried], results[:carried], strict=True)]
      if met == inputs[consts : consts + carried]:
        return results
      inputs = [*inputs[:consts], *met, *inputs[consts + carried :]]
  if op.region == 'cond':
    branches = [_visit(body, inputs[1:], axes_of) for body in op.bodies]
    return [inputs[0].union(*kinds) for kinds in zip(*branches, strict=True)]
  if op.bodies and len(op.bodies[0].inputs) == len(inputs):
    return _visit(op.bodies[0], inputs, axes_of)
  reduced_axes = _named(op)
  if op.name in _REDUCTIONS and op.params.get('axis_index_groups') is None:
    return (
      [union - reduced_axes] * len(op.outputs) if len(op.outputs) == 1 else [axes - reduced_axes for axes in inputs]
    )
  return [union | reduced_axes] * len(op.outputs)  # such as axis_index, ppermute, all_to_all, reduce_scatter


def _named(op: Op) -> Axes:
  """Returns the mesh axes that a collective names."""
  names = op.params.get('axes', op.params.get('axis_name', ()))
  names = names if isinstance(names, tuple | list | frozenset) else (names,)
  return frozenset(name for name in names if isinstance(name, str))
