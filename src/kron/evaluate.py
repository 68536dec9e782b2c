"""Evaluates a program with a probe at every site, so that its gradient carries the statistics.

Each site's operation is replaced by a twin with the same value and the same derivatives, and one more argument, the
probe: zeros shaped like the site's statistics. The probe changes nothing in the forward pass; its cotangent is defined to
be the statistics. Sums over microbatches, shards and loops are then what autodiff does with any cotangent; where a loop
slices a parameter, it slices the probe too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .explicit import automatic
from .operators import Kronecker, Side, Unit, Unitwise
from .operators.factor import accurate
from .operators.unit import by_example
from .parts import Split
from .probes import BASIS, DUE, Basis, Probes, basis_of, cotangent, where_due
from .program import Op, Program, Ref, bind, has_mark, observe_p, vary, varying
from .regions import rematerialise, scan_split, shard
from .sites import Site
from .statistics import COUNTS


class Tap(NamedTuple):
  """A site whose statistics belong to the block of this name.

  bias: whether the block's bias is added here.
  transposed: whether the site uses the block's matrix transposed.
  lifted: where the kernel met a constant before, whose product meets examples here.
  split: into shards; `splits`: whether this site can tell them apart.
  """

  block: str
  site: Site
  operator: Kronecker | Unitwise | Unit
  bias: bool = False
  transposed: bool = False
  lifted: Site | None = None
  split: Split = Split()
  splits: bool = True


class Taps(NamedTuple):
  """By site key; with the survey's `chains` (how the coefficients of weights were made).

  from_loss: whether the loss itself, and not observed outputs, makes the curvature.
  """

  taps: Mapping[int, Sequence[Tap]]
  chains: Mapping[int, Mapping[tuple[int, ...], tuple[tuple[int, float], ...]]]
  from_loss: bool

  def inside(self, program: Program) -> list[Tap]:
    found = []
    for op in program.ops:
      found += self.taps.get(op.outputs[0].index, ()) if op.outputs else ()
      for body in op.bodies:
        found += self.inside(body)
    return found


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
        values[tap.site.position] = _copied(tap, values, probes, _known(tap, scaled, constants))
    here = [tap for tap in here if tap.site.kind != 'free']
    if op.name == observe_p.name:
      if offsets is not None:
        values[0] = values[0] + offsets[len(marks)]
      marks.append(tuple(values))
      results = values[:1]
    elif op.bodies and (has_mark(op) or any(taps.inside(body) for body in op.bodies)):
      results, inner = _region(op, taps, values, probes, scaled, depth, constants)
      marks += inner
    elif here:
      results = [_tapped(op, here, values, probes, [_known(tap, scaled, constants) for tap in here])]
    else:
      results = bind(op, *values)
    env.update({v.index: result for v, result in zip(op.outputs, results, strict=True)})
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


class _Known(NamedTuple):
  """What a site needs to know besides its operands: the weight's coefficient, and what a lifted kernel met."""

  coefficient: Array | None
  constant: Array | None


def _known(tap: Tap, scaled: Mapping[int, Coefficients], constants: Mapping[int, Array]) -> _Known:
  coefficient = scaled.get(tap.site.position, {}).get(tap.site.weight.params)
  return _Known(coefficient, None if tap.lifted is None else constants[tap.lifted.key])


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
    return _sharded(op, body, values, probes)
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


def _sharded(op: Op, body, values, probes: Probes):
  """The body once for each shard; probes go in whole, so that their cotangents are summed over the mesh."""
  axes = _batch_axes(op)

  def local(values, probes):
    results, marks = body(values, probes)
    return results, [tuple(_lead(z) for z in mark) for mark in marks]

  def _lead(z):
    return vary(z, frozenset(axes))

  marks_spec = [PartitionSpec(axes) if axes else PartitionSpec()]
  number = sum(_count_marks(inner) for inner in op.bodies[0].ops)
  return shard(op, local, PartitionSpec(), marks_spec * number)(list(values), probes)


def _count_marks(op: Op) -> int:
  return int(op.name == observe_p.name) + sum(_count_marks(inner) for body in op.bodies for inner in body.ops)


def _batch_axes(op: Op) -> tuple[str, ...]:
  """The mesh axes over which the observations of a shard_map are split: those of its operands' leading axes."""
  found: list[str] = []
  for spec in op.params['in_specs']:
    first = spec[0] if len(spec) else None
    for axis in first if isinstance(first, tuple) else (first,):
      if axis is not None and axis not in found:
        found.append(axis)
  return tuple(found)


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
    _, pull = jax.vjp(lambda floating: bind(op, *_with_floats(values, floating)), _floats(values))
    _, pull_probes = jax.vjp(lambda probes: body(values, probes, *known)[0], probes)
    slopes = _with_floats([None] * len(values), pull(list(dys))[0], values)
    return slopes, pull_probes(list(dys))[0], jax.tree.map(jnp.zeros_like, known)

  twin.defvjp(lambda values, probes, known: (bind(op, *values), (values, probes, known)), backward)
  return twin(list(values), probes, (dict(scaled), dict(constants))), marks


def _floats(values: Sequence[Any]) -> list[Any]:
  """The values that have gradients."""
  return [v for v in values if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]


def _with_floats(values: Sequence[Any], floats: Sequence[Any], like: Sequence[Any] | None = None) -> list[Any]:
  """The values with others in place of those that have gradients (as `like` tells, or they themselves)."""
  others = iter(floats)
  kinds = values if like is None else like
  return [
    next(others) if jnp.issubdtype(jnp.result_type(k), jnp.inexact) else v for v, k in zip(values, kinds, strict=True)
  ]


# --- sites


def _tapped(op: Op, here: Sequence[Tap], values: list[Any], probes: Probes, known: list[_Known]) -> Array:
  """The operation with the probes of its sites."""
  for tap in here:
    if tap.site.kind == 'entrywise' and jnp.shape(values[tap.site.position]) != op.outputs[0].shape:
      i = tap.site.position
      values = [*values[:i], jnp.broadcast_to(values[i], op.outputs[0].shape), *values[i + 1 :]]
  own = {tap.block: probes[tap.block] for tap in here}

  @jax.custom_vjp
  def twin(values, probes, known):
    del probes, known
    return bind(op, *values)[0]

  def forward(values, probes, known):
    y, pull = jax.vjp(lambda floating: bind(op, *_with_floats(values, floating))[0], _floats(values))
    return y, (pull, values, probes, known)

  def backward(residuals, dy):
    pull, values, probes, known = residuals
    slopes = _with_floats([None] * len(values), pull(dy)[0], values)
    found: dict[str, list[dict[str, Array]]] = {}
    for tap, c in zip(here, known, strict=True):
      probe = probes[tap.block]
      found.setdefault(tap.block, []).append(_typed_statistics(op, tap, values, slopes, dy, c, probe))
    sums = {name: cotangent(probe, found[name]) for name, probe in probes.items()}
    return slopes, sums, jax.tree.map(jnp.zeros_like, known)

  twin.defvjp(forward, backward)
  axes = frozenset().union(*(varying(v) for v in values))
  own, known = jax.tree.map(lambda x: vary(x, axes), (own, known))
  return twin(list(values), own, known)


def _copied(tap: Tap, values: list[Any], probes: Probes, known: _Known) -> Array:
  """The operand of a free site, whose cotangent is the gradient of each example's copy."""

  @jax.custom_vjp
  def twin(value, probe, known):
    del probe, known
    return value

  def backward(residuals, dy):
    probe, known = residuals

    def statistics(dy, known, probe):
      return where_due(probe, lambda: _of_all(tap, _of_copies(tap, dy, known, basis_of(probe))))

    found = automatic(statistics, _specs(tap, probe))(dy, known, probe)
    return dy, cotangent(probe, [found]), jax.tree.map(jnp.zeros_like, known)

  twin.defvjp(lambda value, probe, known: (value, (probe, known)), backward)
  value = values[tap.site.position]
  probe, known = jax.tree.map(lambda x: vary(x, varying(value)), (probes[tap.block], known))
  return twin(value, probe, known)


def _of_copies(tap: Tap, slope: Array, known: _Known, basis: Basis | None) -> dict[str, Array]:
  """Statistics from the gradient of each example's copy of a weight."""
  u = _of_examples(tap, slope, known.coefficient)
  if tap.lifted is None:
    return _of_gradients(tap, [u])
  # Each example's use of the product is a use of the kernel, with the constant for its input.
  site, examples = tap.lifted, u.shape[0]
  shape = site.op.outputs[0].shape
  layout = tap.site.weight.arranged((u.shape[1],), tap.site.weight.axes)
  g = jax.vmap(lambda row: site.linear.output_rows(layout.back([shape], row)[0]))(u)  # b s 1 r o
  g = jnp.moveaxis(g.reshape(examples, g.shape[1], -1, g.shape[-1]), 0, 1)
  x = site.linear.input_rows(known.constant)
  x = jnp.broadcast_to(x.reshape(x.shape[0], 1, -1, x.shape[-1]), (x.shape[0], examples, *g.shape[2:3], x.shape[-1]))
  return tap.operator.statistics_of_rows(x, g, Side(), tap.bias, tap.transposed, basis)


def _of_examples(tap: Tap, slope: Array, coefficient: Array | None) -> Array:
  """The gradient of each example with respect to the parameter's channels, (b, c)."""
  slope = accurate(slope)
  slope = slope * (tap.site.weight.scale if coefficient is None else accurate(coefficient))
  return by_example(slope.real, tap.site.weight.axes)


def _typed_statistics(op: Op, tap: Tap, values, slopes, dy, known: _Known, probe) -> dict[str, Array]:
  """`_of_site` where it is due; under Explicit axes of the probe's type."""

  def statistics(values, slopes, dy, known, probe):
    return where_due(probe, functools.partial(_of_site, op, tap, values, slopes, dy, known, basis_of(probe)))

  return automatic(statistics, _specs(tap, probe))(values, slopes, dy, known, probe)


def _specs(tap: Tap, probe: Mapping[str, Array]) -> dict[str, PartitionSpec]:
  """Of a site's statistics."""
  led = lambda k: tap.operator.reduced is None and not k.startswith(COUNTS)  # noqa: E731
  return {k: tap.split.spec if led(k) else PartitionSpec() for k in probe if not k.startswith((BASIS, DUE))}


def _of_gradients(tap: Tap, gradients: list[Array]) -> dict[str, Array]:
  """Statistics from the gradients of each example, (b, c) each."""
  if tap.split.trivial or not tap.splits:
    return tap.operator.statistics(gradients)
  return tap.split.of_each(lambda *g: tap.operator.statistics(list(g)), gradients, [0] * len(gradients))


def _of_all(tap: Tap, sums: dict[str, Array]) -> dict[str, Array]:
  return sums if tap.splits or tap.operator.reduced is not None else tap.split.of_all(sums)


def _of_site(op: Op, tap: Tap, values, slopes, dy: Array, known: _Known, basis: Basis | None) -> dict[str, Array]:
  """What one site adds to the statistics of its block, shard by shard."""
  return _of_all(tap, _statistics(op, tap, values, slopes, dy, known, basis))


def _statistics(op: Op, tap: Tap, values, slopes, dy: Array, known: _Known, basis: Basis | None) -> dict[str, Array]:
  site, coefficient = tap.site, known.coefficient
  if site.kind == 'entrywise' and tap.lifted is not None:
    return _of_copies(tap, slopes[site.position], known, basis)
  if site.kind == 'entrywise':
    gradients = [_of_examples(tap, slopes[site.position], coefficient)]
    if len(tap.operator.layouts) == 2:
      gradients.append(by_example(accurate(dy), site.weight.axes) if tap.bias else jnp.zeros_like(gradients[0]))
    return _of_gradients(tap, gradients)
  if site.kind == 'gain':
    return _of_gradients(tap, [_of_gain(op, site, values, dy, coefficient)])
  side = Side(site.weight.scale)
  if coefficient is not None:
    matrix = site.linear.matrix(coefficient)
    along_rows = site.weight.varies <= set(site.linear.row_axes)  # a scale of all is the rows', as the bias has none
    side = Side(rows=matrix[:, :, 0]) if along_rows else Side(columns=matrix[:, 0])
  x = values[1 - site.position]
  of_rows = lambda x, dy: tap.operator.statistics(site.linear, x, dy, side, tap.bias, tap.transposed, basis)  # noqa: E731
  if tap.split.trivial or not tap.splits or tap.operator.reduced is not None:
    return of_rows(x, dy)
  return tap.split.of_each(of_rows, [x, dy], site.linear.examples)


def _of_gain(op: Op, site: Site, values, dy: Array, derivative: Array) -> Array:
  """The gradient of each example with respect to a factor of the kernel: dy . y(dkernel/dfactor)."""
  full = list(values)
  full[site.position] = derivative.astype(values[site.position].dtype)
  along = accurate(bind(op, *full)[0]) * accurate(dy)
  shape = op.inputs[site.position].shape
  sums = site.linear.output_rows(along).sum(2)  # s b o
  sums = jnp.moveaxis(sums, 1, 0).reshape(-1, *(shape[a] for a in site.linear.column_axes))
  kept = tuple(1 + k for k, a in enumerate(site.linear.column_axes) if a in site.weight.axes)
  return by_example(sums, kept)
