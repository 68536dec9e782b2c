"""Operations with bodies (loops, rematerialised regions, shard_map): what runs where, and how to rebuild them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .marks import observe_p
from .ops import Op, Program, Ref


def observation_marks(program: Program) -> list[Op]:
  """Returns the observation marks of a program in order, including those in bodies."""
  marks = []
  for op in program.ops:
    marks += [op] if op.name == observe_p.name else []
    for body in op.bodies:
      marks += observation_marks(body)
  return marks


def draws_from(program: Program, key: Ref) -> bool:
  """Returns whether random numbers are drawn from a raw key, directly or in a body that it goes into."""
  for op in program.ops:
    places = [i for i, v in enumerate(op.inputs) if isinstance(v, Ref) and v.index == key.index]
    if places and op.name in ('random_wrap', 'threefry2x32'):
      return True
    for body in op.bodies if places else ():
      offset = len(op.inputs) - len(body.inputs)  # the index of a branch comes first
      if any(draws_from(body, body.inputs[i - offset]) for i in places if i >= offset):
        return True
  return False


def rematerialise(op: Op, fn: Callable) -> Callable:
  """Wraps `fn` in the checkpoint policy of the region `op`."""
  return jax.checkpoint(fn, prevent_cse=op.params['prevent_cse'], policy=op.params['policy'])


def scan_split(op: Op) -> tuple[int, int]:
  """Returns how many of a scan's operands are constants and how many are carried; the others are sliced."""
  (body,) = op.bodies
  # Carried values, and the constants before them, have the same rank inside and outside.
  carried = sum(len(v.shape) == len(r.shape) for v, r in zip(op.outputs, _shaped(body.outputs), strict=True))
  whole = sum(len(v.shape) == len(jnp.shape(o)) for v, o in zip(body.inputs, op.inputs, strict=True))
  return whole - carried, carried


def _shaped(values: Sequence[Any]) -> list[Any]:
  return [v if isinstance(v, Ref) else jnp.asarray(v) for v in values]


def batch_axes(op: Op) -> tuple[str, ...]:
  """Returns the mesh axes that split the observations of a shard_map: those of its operands' leading axes."""
  axes: list[str] = []
  for spec in op.params['in_specs']:
    first = spec[0] if len(spec) else None
    for axis in first if isinstance(first, tuple) else (first,):
      if axis is not None and axis not in axes:
        axes.append(axis)
  return tuple(axes)


def manual_axes(op: Op) -> frozenset[str]:
  """Returns the mesh axes along which devices run the body of a shard_map separately."""
  p = op.params
  return frozenset(p.get('newly_manual_axes', p.get('manual_axes', p['mesh'].axis_names)))


def manual_devices(op: Op) -> int:
  """Returns how many devices run the body of a shard_map separately."""
  return math.prod(op.params['mesh'].shape[a] for a in manual_axes(op))


def shard(op: Op, fn: Callable, more_in: Any, more_out: Any) -> Callable:
  """Maps `fn(values, more)` -> (results, more) over the mesh of a shard_map `op`, with specs for the added values."""
  p = op.params
  return jax.shard_map(
    fn,
    mesh=p['mesh'],
    in_specs=(list(p['in_specs']), more_in),
    out_specs=(list(p['out_specs']), more_out),
    axis_names=set(manual_axes(op)),
    check_vma=p['check_vma'],
  )
