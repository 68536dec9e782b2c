"""Evaluates a program with a probe at every site, so that its gradient carries the statistics.

Each site's operation is replaced by a twin with the same value and the same derivatives, and one more argument, the
probe: zeros shaped like the site's statistics. The probe changes nothing in the forward pass; its cotangent is defined to
be the statistics. Sums over microbatches, shards and loops are then what autodiff does with any cotangent; where a loop
slices a parameter, it slices the probe too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ..program import (
  CASTS,
  Op,
  Program,
  Ref,
  batch_axes,
  bind,
  context,
  has_mark,
  observe_p,
  rematerialise,
  scan_split,
  shard,
  used_p,
  vary,
)
from .probes import Probes
from .tapped import Known, Tap, Taps, copied, floats, tapped, with_floats

NOTHING = Taps({}, {}, False)
Coefficients = dict[tuple[int, ...], Array]  # by the parameters of a weight


def evaluate(
  program: Program,
  taps: Taps,
  inputs: Sequence[Array],
  probes: Probes,
  coefficients: Mapping[int, Coefficients] | None = None,
  depth: int = 0,
  constants: Mapping[int, Array] | None = None,
  offsets: Sequence[Array] | None = None,
) -> tuple[list[Array], list[tuple[Array, ...]]]:
  """The program's outputs, and the operands of its observation marks in order.

  Args:
    program: as traced.
    taps: where the probes go.
    inputs: values for the program's inputs.
    probes: zeros, by block and statistic.
    coefficients: of those inputs that are scaled weights, by position.
    depth: how many loops are around it.
    constants: what lifted kernels met, by their site's key.
    offsets: added to the observed outputs of the marks, which must not be inside of bodies then.
  """
  constants = dict(constants or {})
  lifted = {t.lifted.key: t.lifted.position for group in taps.taps.values() for t in group if t.lifted is not None}
  env: dict[int, Any] = dict(program.consts)
  env.update({v.index: value for v, value in zip(program.inputs, inputs, strict=True)})
  known: dict[int, Coefficients] = {program.inputs[i].index: c for i, c in (coefficients or {}).items()}
  wheres: dict[int, Array] = {}
  marks: list[tuple[Array, ...]] = []
  for op in program.ops:
    values = [env[v.index] if isinstance(v, Ref) else v for v in op.inputs]
    scaled = {i: known[v.index] for i, v in enumerate(op.inputs) if isinstance(v, Ref) and v.index in known}
    here = taps.taps.get(op.outputs[0].index, ()) if op.outputs else ()
    if op.outputs and op.outputs[0].index in lifted:
      position = lifted[op.outputs[0].index]
      constants[op.outputs[0].index] = values[1 - position]
    for tap in here:
      if tap.site.kind == 'free':
        values[tap.site.position] = copied(tap, values, probes, _known(tap, scaled, constants))
    here = [tap for tap in here if tap.site.kind != 'free']
    if op.name == observe_p.name:
      if offsets is not None:
        values[0] = values[0] + offsets[len(marks)]
      marks.append(tuple(values))
      results = values[:1]
    elif op.bodies and (has_mark(op) or any(taps.inside(body) for body in op.bodies)):
      with context(op):
        results, inner = _region(op, taps, values, probes, scaled, depth, constants)
      marks += inner
    elif here:
      knows = [_known(tap, scaled, constants)._replace(where=_where(op, tap, wheres)) for tap in here]
      results = [tapped(op, here, values, probes, knows)]
    else:
      results = bind(op, *values)
    env.update({v.index: result for v, result in zip(op.outputs, results, strict=True)})
    if op.name == used_p.name:
      before = wheres.get(op.inputs[0].index, 1.0) if isinstance(op.inputs[0], Ref) else 1.0
      wheres[op.outputs[0].index] = values[1].astype(jnp.float32) * before
    elif op.name in CASTS and isinstance(op.inputs[0], Ref) and op.inputs[0].index in wheres:
      wheres[op.outputs[0].index] = wheres[op.inputs[0].index]
    for v in op.outputs:
      for params, positions in taps.chains.get(v.index, {}).items():
        known.setdefault(v.index, {})[params] = _coefficient(op, v, params, positions, values, scaled)
  return [env[v.index] if isinstance(v, Ref) else v for v in program.outputs], marks


def _coefficient(op: Op, out: Ref, params, positions, values: list[Any], scaled: Mapping[int, Coefficients]) -> Array:
  """d result / d parameter, entry by entry: the tangent of the operation for a parameter that grows by one everywhere."""
  place = next(k for k, v in enumerate(op.outputs) if v.index == out.index)

  def function(*weights):
    full = list(values)
    for (position, _), w in zip(positions, weights, strict=True):
      full[position] = w
    return bind(op, *full)[place]

  primals = [values[i] for i, _ in positions]
  begun = [scaled.get(i, {}).get(params) for i, _ in positions]
  begin = [jnp.full_like(values[i], scale) for i, scale in positions]
  tangents = [b if t is None else t for t, b in zip(begun, begin, strict=True)]
  return jax.lax.stop_gradient(jax.jvp(function, primals, tangents)[1])


def _known(tap: Tap, scaled: Mapping[int, Coefficients], constants: Mapping[int, Array]) -> Known:
  coefficient = scaled.get(tap.site.position, {}).get(tap.site.weight.params)
  return Known(coefficient, None if tap.lifted is None else constants[tap.lifted.key])


def _where(op: Op, tap: Tap, wheres: Mapping[int, Array]) -> Array | None:
  """What `kron.used` says of the input that a kernel meets here."""
  other = op.inputs[1 - tap.site.position] if tap.site.kind == 'linear' else None
  return wheres.get(other.index) if isinstance(other, Ref) else None


# --- bodies


def _region(op: Op, taps: Taps, values, probes: Probes, scaled, depth: int, constants):
  """An operation with bodies that hold sites or marks."""

  def body(values, probes, index=0, shift=0, depth=depth):
    inner = {i - shift: c for i, c in scaled.items() if i >= shift}
    return evaluate(op.bodies[index], taps, values, probes, inner, depth, constants)

  if op.region == 'remat':
    return rematerialise(op, body)(values, probes)
  if op.region == 'cond':
    branches = [lambda v, p, k=k: body(v, p, index=k, shift=1) for k in range(len(op.bodies))]
    return jax.lax.switch(values[0], branches, values[1:], probes)
  if op.region == 'scan':
    return _scan(op, taps, values, probes, scaled, depth, constants)
  if op.region == 'shard_map':
    return _sharded(op, taps, body, values, probes)
  return _custom(op, taps, values, probes, scaled, depth, constants)


def _scan(op: Op, taps: Taps, values, probes: Probes, scaled, depth: int, constants):
  (body,) = op.bodies
  n_consts, n_carry = scan_split(op)
  n_whole = n_consts + n_carry
  consts, carry, xs = values[:n_consts], values[n_consts:n_whole], values[n_whole:]
  sliced = {tap.block for tap in taps.inside(body) if tap.site.loops[depth]}
  moving = {name: probe for name, probe in probes.items() if name in sliced}
  loops = {i: c for i, c in scaled.items() if i >= n_whole}

  def step(carry, xs):
    xs, moving, loops = xs
    own = {**probes, **moving}
    inner = {**{i: c for i, c in scaled.items() if i < n_whole}, **loops}
    results, marks = evaluate(body, taps, [*consts, *carry, *xs], own, inner, depth + 1, constants)
    return results[:n_carry], (results[n_carry:], marks)

  p = op.params
  carry, (ys, marks) = jax.lax.scan(
    step, list(carry), (list(xs), moving, loops), p['length'], reverse=p['reverse'], unroll=p['unroll']
  )
  return [*carry, *ys], marks


def _sharded(op: Op, taps: Taps, body, values, probes: Probes):
  """The body once for each shard; probes go in whole, so that their cotangents are summed over the mesh."""
  spread = {tap.block: tap.site.spread for tap in taps.inside(op.bodies[0]) if tap.site.spread is not None}
  axes = tuple(a for a in batch_axes(op) if a not in spread.values())
  # Probes of layers that lie over the mesh lead with the layers, as the parameters do.
  specs = {
    name: dict.fromkeys(own, PartitionSpec(spread[name]) if name in spread else PartitionSpec())
    for name, own in probes.items()
  }

  def local(values, probes):
    results, marks = body(values, probes)
    return results, [tuple(_lead(z) for z in mark) for mark in marks]

  def _lead(z):
    return vary(z, frozenset(axes))

  marks_spec = [PartitionSpec(axes) if axes else PartitionSpec()]
  number = sum(_count_marks(inner) for inner in op.bodies[0].ops)
  return shard(op, local, specs, marks_spec * number)(list(values), probes)


def _count_marks(op: Op) -> int:
  return int(op.name == observe_p.name) + sum(_count_marks(inner) for body in op.bodies for inner in body.ops)


def _custom(op: Op, taps: Taps, values, probes: Probes, scaled, depth: int, constants):
  """A function with a derivative rule of its own: its value and gradient are its own, its statistics those of its body."""

  def body(values, probes, scaled, constants):
    return evaluate(op.bodies[0], taps, values, probes, scaled, depth, constants)

  marks = body(values, probes, scaled, constants)[1] if has_mark(op) else []
  if marks and not taps.from_loss:
    return bind(op, *values), marks
  marks = jax.lax.stop_gradient(marks)  # these only count the observations

  @jax.custom_vjp
  def twin(values, probes, known):
    del probes, known
    return bind(op, *values)

  def backward(residuals, dys):
    values, probes, known = residuals
    _, pull = jax.vjp(lambda floating: bind(op, *with_floats(values, floating)), floats(values))
    _, pull_probes = jax.vjp(lambda probes: body(values, probes, *known)[0], probes)
    slopes = with_floats([None] * len(values), pull(list(dys))[0], values)
    return slopes, pull_probes(list(dys))[0], jax.tree.map(jnp.zeros_like, known)

  twin.defvjp(lambda values, probes, known: (bind(op, *values), (values, probes, known)), backward)
  return twin(list(values), probes, (dict(scaled), dict(constants))), marks
