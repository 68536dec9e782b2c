"""Follows masks from `kron.used`, through operations that rearrange a marked input, to the kernels that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ...program import CASTS, Op, Program, Ref, bind, scan_split, source_line, used_p
from ..errors import CurvatureError

_MOVES = ('reshape', 'squeeze', 'expand_dims', 'broadcast_in_dim', 'slice', 'dynamic_slice', 'rev')
_LINEAR = ('dot_general', 'conv_general_dilated')


def moved(op: Op, mask: Array, values: Sequence[Any]) -> Array | None:
  """Returns the mask of an operation's result from the mask of its first operand, or None if it cannot be followed."""
  if op.name in CASTS:
    return mask
  if op.name == 'transpose':
    return mask.transpose(op.params['permutation'])
  if op.name in _MOVES and fits(mask.shape, jnp.shape(values[0])):
    return bind(op, jnp.broadcast_to(mask, jnp.shape(values[0])), *values[1:])[0]
  return None


def fits(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Checks whether a mask of this shape broadcasts to an array of the other shape with as many axes."""
  return len(mask) == len(shape) and all(m in (1, n) for m, n in zip(mask, shape, strict=True))


def check_used(program: Program) -> None:
  """Raises CurvatureError for a mark of uses that reaches no linear operation and so would change nothing."""
  for op in program.ops:
    if op.name == used_p.name and not _reaches(program, op.outputs[0], op.inputs[1].shape, _following(program, op)):
      raise CurvatureError(
        f'kron.used at {source_line(op)} marks a value that no matrix product and no convolution reads; mark the '
        'very input of the layer (a reshape, a transposition or a cast may stand between)'
      )
    for body in op.bodies:
      check_used(body)


def _following(program: Program, op: Op) -> tuple[Op, ...]:
  return program.ops[next(k for k, other in enumerate(program.ops) if other is op) + 1 :]


def _reaches(program: Program, value: Ref, mask: tuple[int, ...], ops: Sequence[Op]) -> bool:
  """Checks whether a masked value of a program reaches an operation that has a kernel."""
  masks = {value.index: mask}
  for op in ops:
    places = [i for i, v in enumerate(op.inputs) if isinstance(v, Ref) and v.index in masks]
    if places and op.name in _LINEAR:
      return True
    for body in op.bodies if places else ():
      for i in inside(op, body, places):
        inner = body.inputs[i - _offset(op, body)]
        shape = masks[op.inputs[i].index]
        shape = shape[len(shape) - len(inner.shape) :] if len(inner.shape) <= len(shape) else inner.shape
        if _reaches(body, inner, shape, body.ops):
          return True
    if places == [0] or (places and op.name in CASTS):
      shape = masks[op.inputs[0].index]
      if op.name in CASTS:
        masks[op.outputs[0].index] = shape
      elif op.name == 'transpose':
        masks[op.outputs[0].index] = tuple(shape[a] for a in op.params['permutation'])
      elif op.name in _MOVES and fits(shape, op.inputs[0].shape):
        masks[op.outputs[0].index] = op.outputs[0].shape
  return False


def inside(op: Op, body: Program, places: Sequence[int]) -> list[int]:
  """Returns which of these operands take their masks into a body: all but those that a loop carries."""
  if op.region == 'scan':
    consts, carried = scan_split(op)
    return [i for i in places if not consts <= i < consts + carried]
  return [i for i in places if i >= _offset(op, body)]


def _offset(op: Op, body: Program) -> int:
  """Returns how many operands come before those that go into a body, such as the index of a branch."""
  return len(op.inputs) - len(body.inputs)
