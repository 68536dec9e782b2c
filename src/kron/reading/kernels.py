"""Rules for a kernel that meets data in a linear operation, or meets a constant first."""

from __future__ import annotations

from typing import Any

from ...program import Op
from ..operators import LINEAR, Dense, Linear
from ..operators.weights import Weight
from .sites import DATA, FIXED, INPUT, Walk
from .values import is_one_hot


def meet(op: Op, kinds: list[Any], weights: list[int], walk: Walk) -> list[Any] | None:
  """Notes where a kernel meets data in a linear operation; returns the kinds of the results, or None if it does not."""
  others = [k for j, k in enumerate(kinds) if j != weights[0]]
  if all(k in (None, FIXED) for k in others):
    return _lifted(op, weights[0], kinds[weights[0]], walk)
  if len(weights) > 1 or not all(k in (DATA, INPUT) for k in others):
    return None
  i, weight = weights[0], kinds[weights[0]]
  for operator in LINEAR:
    linear = operator.recognise(op, i, weight)
    if linear is None:
      continue
    if isinstance(linear, Dense) and is_one_hot(op.inputs[1 - i], linear.input_axes[2], walk):
      linear = linear._replace(one_hot=True)
    if weight.bent:
      walk.refuse(walk.params(weight), f'{op.name} (with a kernel that is not a multiple of the parameter)', op)
      return [DATA] * len(op.outputs)
    if weight.chained and not (weight.covers(op.inputs[i].shape) and _separable(linear, weight)):
      if weight.meeting is not None and min(linear.n_in, linear.n_out) == 1:
        return None  # the weight is an activation
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
  """Makes a weight of a kernel times a constant (such as a derivative's direction), which examples meet later."""
  operators = [operator.recognise(op, i, weight) for operator in LINEAR[:2]]
  linear = next((f for f in operators if f is not None), None)
  if linear is None or weight.chained or weight.params[0] < 0:
    return None
  number = -op.outputs[0].index
  walk.survey.lifted[number] = walk.site('lifted', op, i, weight, linear)
  return [Weight.of(number, op.outputs[0].shape)]


def _separable(linear: Linear, weight: Weight) -> bool:
  """Returns whether the kernel's coefficient varies only along rows, or only along columns (and slots)."""
  if weight.gains:
    return weight.varies <= set(linear.column_axes)
  return weight.varies <= set(linear.row_axes) or weight.varies <= set(linear.column_axes)
