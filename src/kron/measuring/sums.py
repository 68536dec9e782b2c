"""Notices a loss that is a sum, where K-FAC expects the mean over the observations.

The part of the loss behind its marks is small: it has no network in it. With the outputs z of the marks as its inputs,
its Hessian must be the likelihood's Fisher information divided by the number of observations. The ratio of the two
along one direction tells how many times too large the loss is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...program import Op, Program, Ref, is_known
from ..products import information_product
from .evaluate import NOTHING, evaluate
from .observations import Observed, shares

_MANY = 3.0  # a loss that is this many times the mean is told
_LARGEST = 2**22  # entries of outputs for which the Hessian is worth a look
_NETWORK = ('dot_general', 'conv_general_dilated', 'scan', 'while', 'cond', 'shard_map')


def warn_of_sum(program: Program, marks: Sequence[Op]) -> None:
  """Warns if the loss seems to be a sum over its observations rather than their mean."""
  tail = tail_of(program, marks)
  if tail is None or not _seems_to_sum(tail, marks):
    return
  ratio = float(scale(tail, marks))
  if math.isfinite(ratio) and ratio >= _MANY:
    number = sum(math.prod(_leading(mark)) for mark in marks)
    warnings.warn(
      f'the loss is about {ratio:.3g} times the mean over its {number:,} observations, which makes the steps of K-FAC '
      'too long by this factor; divide the loss by their number',
      stacklevel=4,
    )


def tail_of(program: Program, marks: Sequence[Op]) -> Program | None:
  """Returns the part of a program between its marks and the loss, or None if that is more than the loss itself.

  Its inputs are the outputs of the marks, followed by those inputs of the program that it needs. Its outputs are the
  loss, and the mask, weight and other arrays of each mark.
  """
  ends = {mark.outputs[0].index for mark in marks}
  operands = [v for mark in marks for v in mark.inputs[1:]]
  needed = {v.index for v in (program.outputs[0], *operands) if isinstance(v, Ref)}
  kept, above = [], set()
  for op in reversed(program.ops):
    if not any(ref.index in needed for ref in op.outputs):
      continue
    if op.outputs[0].index in ends:
      above.add(op.outputs[0].index)
      continue
    if op.name in _NETWORK:
      return None
    kept.append(op)
    needed |= {v.index for v in op.inputs if isinstance(v, Ref)}
  if above != ends or sum(math.prod(mark.outputs[0].shape) for mark in marks) > _LARGEST:
    return None
  inputs = [mark.outputs[0] for mark in marks] + [v for v in program.inputs if v.index in needed]
  consts = {index: value for index, value in program.consts.items() if index in needed}
  return Program(tuple(inputs), consts, tuple(reversed(kept)), (program.outputs[0], *operands))


def _leading(mark: Op) -> tuple[int, ...]:
  return mark.outputs[0].shape[: len(mark.outputs[0].shape) - mark.params['likelihood'].event_ndims]


def _seems_to_sum(tail: Program, marks: Sequence[Op]) -> bool:
  """Checks whether the constants by which a loss is divided are less than a third of its observations.

  It is quick and errs on the side of suspicion; a division by an array counts as the mean.
  """
  moving, divisor = {v.index for v in tail.inputs[: len(marks)]}, 1.0
  for op in tail.ops:
    moves = [isinstance(v, Ref) and v.index in moving for v in op.inputs]
    if not any(moves):
      continue
    moving |= {v.index for v in op.outputs}
    if op.name in ('div', 'mul') and len(moves) == 2 and not all(moves):
      other = op.inputs[moves.index(False)]
      if isinstance(other, Ref) or not is_known(other):
        return False
      number = float(np.abs(np.asarray(other)).max(initial=0)) or 1.0  # a literal, also where the loss is traced
      divisor *= number if op.name == 'div' and moves[0] else 1 / number
  return divisor * _MANY < max(math.prod(_leading(mark)) for mark in marks)


def scale(tail: Program, marks: Sequence[Op]) -> Float[Array, '']:
  """Returns the loss's size as a multiple of the mean: u^T H u over u^T F u, with u and the outputs drawn at random."""
  rest = [_stand_in(v) for v in tail.inputs[len(marks) :]]
  if any(x is None for x in rest):
    return jnp.asarray(jnp.nan)

  @jax.jit
  def ratio(key: Any) -> Float[Array, '']:
    of_marks = [mark.outputs[0] for mark in marks]
    keys = jax.random.split(key, 2 * len(marks))
    draw = lambda k, v: jax.random.normal(k, v.shape, jnp.float32).astype(v.dtype)  # noqa: E731
    z, u = ([draw(k, v) for k, v in zip(some, of_marks, strict=True)] for some in (keys[::2], keys[1::2]))
    run = lambda outputs: evaluate(tail, NOTHING, [*outputs, *rest], {})[0]  # noqa: E731
    extra, observed = run(z)[1:], []
    for mark, outputs in zip(marks, z, strict=True):
      count = len(mark.inputs) - 1
      observed.append(Observed.of(mark, outputs, extra[:count]))
      extra = extra[count:]
    bent = jax.jvp(jax.grad(lambda outputs: run(outputs)[0].astype(jnp.float32)), (z,), (u,))[1]
    numbers = [o.number() for o in observed]
    inner = lambda a, b: sum(jnp.sum((x.conj() * y).real) for x, y in zip(a, b, strict=True))  # noqa: E731
    expected = [
      o.times_share(information_product(o.likelihood, o.prepared(), x), share / max(numbers))
      for o, x, share in zip(observed, u, shares(numbers), strict=True)
    ]
    return inner(u, bent) / inner(u, expected)

  try:
    return ratio(jax.random.key(0))
  except Exception:  # the loss's own functions may not have a second derivative
    return jnp.asarray(jnp.nan)


def _stand_in(ref: Ref) -> Array | None:
  """Returns values for an input of the loss that is not there yet: class 0, True, or ones; None for a key."""
  if jnp.issubdtype(ref.dtype, jax.dtypes.prng_key):
    return None
  whole = jnp.issubdtype(ref.dtype, jnp.integer)
  return jnp.zeros(ref.shape, ref.dtype) if whole else jnp.ones(ref.shape, ref.dtype)
