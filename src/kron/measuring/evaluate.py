"""Evaluation of a program with a probe at every site, so that its gradient carries the statistics.

A twin replaces each site's operation. It has the same value and the same derivatives, and one more argument, the probe:
zeros with the shape of the site's statistics. The probe changes nothing in the forward pass, and its cotangent is
defined to be the statistics. Autodiff then sums them over microbatches, shards and loops as it sums any cotangent. A
loop that slices a parameter slices its probe too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ...program import (
  Op,
  Operand,
  Program,
  Ref,
  batch_axes,
  bind,
  context,
  has_mark,
  observation_marks,
  observe_p,
  rematerialise,
  scan_split,
  shard,
  used_p,
  vary,
  varying,
)
from ..errors import CurvatureError
from ..operators.masks import fits, inside, moved
from .probes import Probes
from .site_vjp import Known, Tap, Taps, copied, floats, site_vjp, with_floats

NOTHING = Taps({}, {}, False)
Coefficients = dict[tuple[int, ...], Array]  # keyed by the parameters of a weight


class About(NamedTuple):
  """Facts about a program's inputs besides their values, by position.

  coefficients: those of scaled weights.
  masks: those of inputs that `kron.used` marks.
  """

  coefficients: Mapping[int, Coefficients] = MappingProxyType({})
  masks: Mapping[int, Array] = MappingProxyType({})

  def only(self, keep: Callable[[int], bool], shift: int = 0) -> About:
    """Keeps the facts about the inputs whose positions `keep` accepts, and counts positions from `shift` on."""
    return About(*({i - shift: x for i, x in known.items() if keep(i)} for known in self))


class Around(NamedTuple):
  """The surroundings of a body.

  depth: the number of loops around it.
  constants: the constants that lifted kernels met, by the key of their site.
  """

  depth: int = 0
  constants: Mapping[int, Array] = MappingProxyType({})


def evaluate(
  program: Program,
  taps: Taps,
  inputs: Sequence[Operand],
  probes: Probes,
  about: About = About(),  # noqa: B008  (immutable)
  around: Around = Around(),  # noqa: B008  (immutable)
  offsets: Sequence[Array] | None = None,
) -> tuple[list[Operand], list[tuple[Operand, ...]]]:
  """Returns the program's outputs, and the operands of its observation marks in order.

  Args:
    program: the program as traced.
    taps: the sites that the probes go to.
    inputs: values for the program's inputs.
    probes: zeros, by block and statistic.
    about: further facts about the inputs.
    around: the surroundings of the program, if it is a body.
    offsets: arrays to add to the observed outputs of the marks; no mark may then be inside of a body.
  """
  constants = dict(around.constants)
  lifted = {t.lifted.key: t.lifted.position for group in taps.taps.values() for t in group if t.lifted is not None}
  env: dict[int, Any] = dict(program.consts)
  env.update({v.index: value for v, value in zip(program.inputs, inputs, strict=True)})
  known: dict[int, Coefficients] = {program.inputs[i].index: c for i, c in about.coefficients.items()}
  masks: dict[int, Array] = {program.inputs[i].index: m for i, m in about.masks.items()}
  marks: list[tuple[Array, ...]] = []
  for op in program.ops:
    values = [env[v.index] if isinstance(v, Ref) else v for v in op.inputs]
    scaled = {i: known[v.index] for i, v in enumerate(op.inputs) if isinstance(v, Ref) and v.index in known}
    masked = {i: masks[v.index] for i, v in enumerate(op.inputs) if isinstance(v, Ref) and v.index in masks}
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
      results = [_slope_times(values[0], taps.factors[op.outputs[0].index])] if taps.factors else values[:1]
    elif op.bodies and (has_mark(op) or any(taps.inside(body) for body in op.bodies)):
      with context(op):
        results, inner = _region(op, taps, values, probes, About(scaled, masked), around._replace(constants=constants))
      marks += inner
    elif here:
      knows = [_known(tap, scaled, constants)._replace(where=_where(tap, masked)) for tap in here]
      results = [site_vjp(op, here, values, probes, knows)]
    else:
      results = bind(op, *values)
    env.update({v.index: result for v, result in zip(op.outputs, results, strict=True)})
    if op.name == used_p.name:
      masks[op.outputs[0].index] = values[1].astype(jnp.float32) * masked.get(0, 1.0)
    elif 0 in masked and not op.bodies and (mask := moved(op, masked[0], values)) is not None:
      masks[op.outputs[0].index] = mask
    for v in op.outputs:
      for params, positions in taps.chains.get(v.index, {}).items():
        known.setdefault(v.index, {})[params] = _coefficient(op, v, params, positions, values, scaled)
  return [env[v.index] if isinstance(v, Ref) else v for v in program.outputs], marks


def _slope_times(z: Array, factor: Array) -> Array:
  """Returns z, and multiplies its gradient by the factor."""

  @jax.custom_vjp
  def twin(z, factor):
    del factor
    return z

  twin.defvjp(lambda z, factor: (z, factor), lambda factor, dz: (dz * factor.astype(dz.dtype), jnp.zeros_like(factor)))
  return twin(z, vary(factor, varying(z)))


def _coefficient(op: Op, out: Ref, params, positions, values: list[Any], scaled: Mapping[int, Coefficients]) -> Array:
  """Computes d result / d parameter, entry by entry, as the JVP for a tangent of ones on the parameter."""
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
  if op.plain or op.name.startswith('custom_vjp'):  # passes gradients through, see `weight_rules.straight_through`
    return jax.lax.stop_gradient(tangents[0])
  return jax.lax.stop_gradient(jax.jvp(function, primals, tangents)[1])


def _known(tap: Tap, scaled: Mapping[int, Coefficients], constants: Mapping[int, Array]) -> Known:
  coefficient = scaled.get(tap.site.position, {}).get(tap.site.weight.params)
  return Known(coefficient, None if tap.lifted is None else constants[tap.lifted.key])


def _where(tap: Tap, masked: Mapping[int, Array]) -> Array | None:
  """Returns the mask from `kron.used` for the input that a kernel meets here, if there is one."""
  return masked.get(1 - tap.site.position) if tap.site.kind == 'linear' else None


# --- bodies


def _region(op: Op, taps: Taps, values, probes: Probes, about: About, around: Around):
  """Evaluates an operation whose bodies hold sites or marks."""
  about = about._replace(masks=_going_inside(op, values, about.masks))

  def body(values, probes, index=0, shift=0, about=about):
    return evaluate(op.bodies[index], taps, values, probes, about.only(lambda i: i >= shift, shift), around)

  if op.region == 'remat':
    return rematerialise(op, body)(values, probes)
  if op.region == 'cond':
    branches = [lambda v, p, k=k: body(v, p, index=k, shift=1) for k in range(len(op.bodies))]
    return jax.lax.switch(values[0], branches, values[1:], probes)
  if op.region == 'scan':
    return _scan(op, taps, values, probes, about, around)
  if op.region == 'shard_map':
    return _sharded(op, taps, body, values, probes, about)
  return _custom(op, taps, values, probes, about, around)


def _going_inside(op: Op, values, masks: dict[int, Array]) -> dict[int, Array]:
  """Returns the masks that go into the bodies of an operation, broadcast to the shapes of their values."""
  places = inside(op, op.bodies[0], list(masks))
  shapes = {i: jnp.shape(values[i]) for i in places}
  return {i: jnp.broadcast_to(masks[i], shapes[i]) for i in places if fits(masks[i].shape, shapes[i])}


def _scan(op: Op, taps: Taps, values, probes: Probes, about: About, around: Around):
  (body,) = op.bodies
  n_consts, n_carry = scan_split(op)
  n_whole = n_consts + n_carry
  consts, carry, xs = values[:n_consts], values[n_consts:n_whole], values[n_whole:]
  sliced = {tap.block for tap in taps.inside(body) if tap.site.loops[around.depth]}
  moving = {name: probe for name, probe in probes.items() if name in sliced}
  loops, fixed = about.only(lambda i: i >= n_whole), about.only(lambda i: i < n_whole)

  def step(carry, xs):
    xs, moving, loops = xs
    all_probes = {**probes, **moving}
    inner = About(*({**f, **l} for f, l in zip(fixed, loops, strict=True)))
    results, marks = evaluate(
      body, taps, [*consts, *carry, *xs], all_probes, inner, around._replace(depth=around.depth + 1)
    )
    return results[:n_carry], (results[n_carry:], marks)

  p = op.params
  carry, (ys, marks) = jax.lax.scan(
    step, list(carry), (list(xs), moving, loops), p['length'], reverse=p['reverse'], unroll=p['unroll']
  )
  return [*carry, *ys], marks


def _sharded(op: Op, taps: Taps, body, values, probes: Probes, about: About):
  """Evaluates the body once for each shard; probes go in whole, so that their cotangents are summed over the mesh."""
  spread = {tap.block: tap.site.spread for tap in taps.inside(op.bodies[0]) if tap.site.spread is not None}
  axes = tuple(a for a in batch_axes(op) if a not in spread.values())
  # If layers are distributed over the mesh, their probes lead with the layers, as the parameters do.
  specs = {
    name: jax.tree.map(lambda _, name=name: PartitionSpec(spread[name]) if name in spread else PartitionSpec(), probe)
    for name, probe in probes.items()
  }
  masks = {i: op.params['in_specs'][i] for i in about.masks}

  def local(values, more):
    probes, masks = more
    results, marks = body(values, probes, about=about._replace(masks=masks))
    return results, [tuple(_lead(z, mark[0]) for z in mark) for mark in marks]

  def _lead(x, outputs):
    # A single number for all observations of a mark may differ between shards, so each observation gets a copy.
    return vary(x if x.ndim else jnp.broadcast_to(x, outputs.shape[:1]), frozenset(axes))

  led = PartitionSpec(axes) if axes else PartitionSpec()
  marks_spec = [(led,) * len(mark.inputs) for mark in observation_marks(op.bodies[0])]
  return shard(op, local, (specs, masks), marks_spec)(list(values), (probes, about.masks))


def _custom(op: Op, taps: Taps, values, probes: Probes, about: About, around: Around):
  """Evaluates a function with a custom derivative rule, and takes only the statistics from its body."""

  def body(values, probes, about, constants):
    return evaluate(op.bodies[0], taps, values, probes, about, around._replace(constants=constants))

  marks = body(values, probes, about, around.constants)[1] if has_mark(op) else []
  if marks and not taps.from_loss:
    return bind(op, *values), marks
  if marks and taps.factors:
    raise CurvatureError(
      "fisher='empirical' with marks of several sizes: one of them is inside of a function with a derivative rule of its "
      'own; mark outside of it'
    )
  marks = jax.lax.stop_gradient(marks)  # they only count the observations

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
  return twin(list(values), probes, (about, dict(around.constants))), marks
