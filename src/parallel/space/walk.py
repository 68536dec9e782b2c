"""The interpreter of programs in strips: it runs every operation on each device's rows, by the rule for its kind.

It reads a program as `kron` does. An operation gets the rows that it needs of other devices by `halo.fetch`, and sums
over all rows by an all-reduce; nothing is gathered. An operation without a rule is refused with its layer and its line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...program import Op, Program, Ref, at, context, used
from . import attention, control_flow, convolutions, entrywise, pools, products, reductions, shapes, slicing
from .values import Known, Value, anywhere, on_device, refuse, whole

Rule = Callable[[Op, list[Any]], list[Value] | None]

RULES: Mapping[str, Rule] = {
  **entrywise.RULES,
  **shapes.RULES,
  **reductions.RULES,
  **convolutions.RULES,
  **pools.RULES,
  **products.RULES,
  **slicing.RULES,
  **attention.RULES,
}
BODIES = control_flow.RULES


def run(program: Program, inputs: Sequence[Any]) -> list[Any]:
  """Runs a program on `Value`s, `Known`s or numbers, and returns its outputs."""
  env: dict[int, Any] = dict(program.consts)
  env.update({v.index: value for v, value in zip(program.inputs, inputs, strict=True)})
  run_ops(program.ops, env)
  return [read(env, v) for v in program.outputs]


def read(env: Mapping[int, Any], v: Any) -> Any:
  return env[v.index] if isinstance(v, Ref) else v


def run_ops(ops: Sequence[Op], env: dict[int, Any]) -> None:
  """Runs operations one after another on the values in `env`, and stores their results there."""
  for op in ops:
    inputs = [read(env, v) for v in op.inputs]
    with at(op), context(op):
      outputs = results(op, inputs)
    env.update({v.index: result for v, result in zip(op.outputs, outputs, strict=True)})


def results(op: Op, inputs: list[Any]) -> list[Any]:
  """Computes the results of an operation."""
  values = [v for v in inputs if isinstance(v, Value)]
  live = next((v.live for v in values if v.live is not None), None)
  if live is not None:
    return [v._replace(live=live) for v in map(on_device, _results(op, [_counted(op, v) for v in inputs]))]
  return _results(op, inputs)


def _counted(op: Op, v: Any) -> Any:
  """Marks the input of a linear operation so that only live results count as uses of its kernel."""
  if not isinstance(v, Value) or v.live is None or op.name not in ('dot_general', 'conv_general_dilated'):
    return v
  return v._replace(x=used(v.x, v.live.reshape((1,) * v.x.ndim)))


def _results(op: Op, inputs: list[Any]) -> list[Any]:
  values = [v for v in inputs if isinstance(v, Value)]
  if not values and not op.bodies and not op.eqn.effects and _constant(op):
    return [Known(op, inputs, place) for place in range(len(op.outputs))]
  if op.name == 'sharding_constraint':
    return [entrywise.constrained(op, on_device(inputs[0]))]
  if all(v.whole for v in values):
    if op.bodies and op.region in BODIES:  # a body may contain constraints and kept functions
      return BODIES[op.region](op, [on_device(v) for v in inputs], run)
    return [whole(x) for x in anywhere(op, [on_device(v).x for v in inputs])]
  if op.region in BODIES:
    outputs = BODIES[op.region](op, [on_device(v) for v in inputs], run)
  else:
    rule = RULES.get(op.name) or RULES.get(op.params.get('name', ''))
    outputs = None if rule is None else rule(op, inputs)
  if outputs is None:
    lies = ', '.join(f'axis {dim} of {v.shape} over {s.axis!r}' for v in values for dim, s in v.dims)
    refuse(op, f'there is no rule for it where {lies}')
  return outputs


def _constant(op: Op) -> bool:
  """Tells whether an operation without outside operands gives the same result at every call."""
  return not op.name.startswith(('random', 'rng', 'threefry', 'axis_index'))
