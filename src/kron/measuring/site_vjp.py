"""Operations of sites, with probes whose cotangents are the sites' statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ...program import Op, Program, bind, vary, varying
from ..explicit import automatic
from ..operators import Conv, Kronecker, Side, Unit, Unitwise
from ..operators.factor import accurate
from ..operators.unit import by_example
from ..reading.sites import Site
from ..statistics import BlockSums
from .probes import Basis, Probe, Probes, cotangent, where_due
from .shards import Shards


class Tap(NamedTuple):
  """A site whose statistics belong to the block of this name.

  bias: whether the block's bias is added here.
  transposed: whether the site uses the block's matrix transposed.
  lifted: the site where the kernel met a constant before; their product meets examples here.
  shards: the shards of the batch.
  by_shard: whether this site can tell the shards apart.
  """

  block: str
  site: Site
  operator: Kronecker | Unitwise | Unit
  bias: bool = False
  transposed: bool = False
  lifted: Site | None = None
  shards: Shards = Shards()
  by_shard: bool = True


class Taps(NamedTuple):
  """All taps of a program.

  taps: the taps by the key of their site.
  chains: the survey's `chains`, which tell how the coefficients of weights were made.
  from_loss: whether the loss itself makes the curvature, and not the observed outputs.
  factors: by the output of a mark, the factor for the gradients that flow back through it; None for no factors.
  """

  taps: Mapping[int, Sequence[Tap]]
  chains: Mapping[int, Mapping[tuple[int, ...], tuple[tuple[int, float], ...]]]
  from_loss: bool
  factors: Mapping[int, Array] | None = None

  def inside(self, program: Program) -> list[Tap]:
    taps = []
    for op in program.ops:
      taps += self.taps.get(op.outputs[0].index, ()) if op.outputs else ()
      for body in op.bodies:
        taps += self.inside(body)
    return taps


class Known(NamedTuple):
  """The arrays that a site needs besides its operands.

  coefficient: the weight's coefficient.
  constant: the constant that a lifted kernel met.
  where: numbers that tell which of the site's results count.
  """

  coefficient: Array | None
  constant: Array | None
  where: Array | None = None


def site_vjp(op: Op, here: Sequence[Tap], values: list[Any], probes: Probes, known: list[Known]) -> Array:
  """Evaluates the operation with the probes of its sites."""
  local_probes = {tap.block: probes[tap.block] for tap in here}

  @jax.custom_vjp
  def twin(values, probes, known):
    del probes, known
    return bind(op, *values)[0]

  def forward(values, probes, known):
    y, pull = jax.vjp(lambda floating: bind(op, *with_floats(values, floating))[0], floats(values))
    return y, (pull, values, probes, known)

  def backward(residuals, dy):
    pull, values, probes, known = residuals
    slopes = with_floats([None] * len(values), pull(dy)[0], values)
    block_sums: dict[str, list[BlockSums]] = {}
    for tap, c in zip(here, known, strict=True):
      statistics = _typed_statistics(op, tap, values, _of_all_devices(tap, dy), c, probes[tap.block])
      block_sums.setdefault(tap.block, []).append(_once(tap, statistics))
    sums = {name: cotangent(probe, block_sums[name]) for name, probe in probes.items()}
    return slopes, sums, jax.tree.map(jnp.zeros_like, known)

  twin.defvjp(forward, backward)
  axes = frozenset().union(*(varying(v) for v in values))
  known = jax.tree.map(lambda x: vary(x, axes), known)
  for tap in here:
    local_probes[tap.block] = jax.tree.map(lambda x, tap=tap: vary(x, axes - _joint(tap)), local_probes[tap.block])
  return twin(list(values), local_probes, known)


def _joint(tap: Tap) -> frozenset[str]:
  """Returns the mesh axes over which the gradient of an example is summed before its products are taken."""
  return tap.site.places if isinstance(tap.operator, Unit) or tap.lifted is not None else frozenset()


def copied(tap: Tap, values: list[Any], probes: Probes, known: Known) -> Array:
  """Returns a free site's operand with its probe; the operand's cotangent is the gradient of each example's copy."""

  @jax.custom_vjp
  def twin(value, probe, known):
    del probe, known
    return value

  def backward(residuals, dy):
    probe, known = residuals

    def statistics(dy, known, probe):
      return where_due(probe.due, lambda: _of_all(tap, _of_copies(tap, dy, known, probe.basis or None)))

    sums = automatic(statistics, _specs(tap, probe))(_of_all_devices(tap, dy), known, probe)
    return dy, cotangent(probe, [_once(tap, sums)]), jax.tree.map(jnp.zeros_like, known)

  twin.defvjp(lambda value, probe, known: (value, (probe, known)), backward)
  value = values[tap.site.position]
  known = jax.tree.map(lambda x: vary(x, varying(value)), known)
  probe = jax.tree.map(lambda x: vary(x, varying(value) - _joint(tap)), probes[tap.block])
  return twin(value, probe, known)


def _of_copies(tap: Tap, slope: Array, known: Known, basis: Basis | None) -> BlockSums:
  """Computes statistics from the gradient of each example's copy of a weight."""
  u = _over_places(tap, _of_examples(tap, slope, known.coefficient))
  if tap.lifted is None:
    return _of_gradients(tap, [u])
  # Each example's use of the product is a use of the kernel whose input is the constant.
  site, examples = tap.lifted, u.shape[0]
  shape = site.op.outputs[0].shape
  layout = tap.site.weight.arranged((u.shape[1],), tap.site.weight.axes)
  g = jax.vmap(lambda row: site.linear.output_rows(layout.back([shape], row)[0]))(u)  # b s 1 r o
  g = jnp.moveaxis(g.reshape(examples, g.shape[1], -1, g.shape[-1]), 0, 1)
  x = site.linear.input_rows(known.constant)
  x = jnp.broadcast_to(x.reshape(x.shape[0], 1, -1, x.shape[-1]), (x.shape[0], examples, *g.shape[2:3], x.shape[-1]))
  return tap.operator.statistics_of_rows(x, g, Side(), tap.bias, tap.transposed, basis)


def _of_examples(tap: Tap, slope: Array, coefficient: Array | None) -> Array:
  """Returns the gradient of each example with respect to the parameter's channels, (b, c)."""
  slope = accurate(slope)
  slope = slope * (tap.site.weight.scale if coefficient is None else accurate(coefficient))
  return by_example(slope.real, tap.site.weight.axes)


def _typed_statistics(op: Op, tap: Tap, values, dy, known: Known, probe: Probe) -> BlockSums:
  """Computes `_of_site` where it is due, and gives it the probe's type under Explicit axes."""

  def statistics(values, dy, known, probe):
    return where_due(probe.due, functools.partial(_of_site, op, tap, values, dy, known, probe.basis or None))

  return automatic(statistics, _specs(tap, probe))(values, dy, known, probe)


def _specs(tap: Tap, probe: Probe) -> BlockSums:
  """Returns the sharding of each of a site's statistics."""
  led = tap.shards.spec if tap.operator.reduced is None else PartitionSpec()
  return BlockSums(dict.fromkeys(probe.products, led), dict.fromkeys(probe.uses, PartitionSpec()))


def _of_gradients(tap: Tap, gradients: list[Array]) -> BlockSums:
  """Computes statistics from the gradients of each example, (b, c) each.

  If the places of an example lie on several devices, its gradient is the sum of theirs.
  """
  gradients = [_over_places(tap, u) for u in gradients]
  if tap.shards.trivial or not tap.by_shard:
    return tap.operator.statistics(gradients)
  return tap.shards.of_each(lambda *g: tap.operator.statistics(list(g)), gradients, [0] * len(gradients))


def _of_all_devices(tap: Tap, dy: Array) -> Array:
  """Sums the gradient of a result over devices of an unchecked shard_map that hold equal copies of the result.

  Each of these devices has only a part of the gradient.
  """
  axes = tuple(sorted(tap.site.unchecked - tap.site.differs))
  return jax.lax.psum(dy, axes) if axes else dy


def _once(tap: Tap, statistics: BlockSums) -> BlockSums:
  """Divides statistics by the number of devices of an unchecked shard_map that hold equal copies of them.

  The sum over all devices then counts them once.
  """
  axes = (tap.site.unchecked - tap.site.differs) | (_joint(tap) & tap.site.unchecked)
  times = math.prod(jax.lax.axis_size(a) for a in axes)
  return statistics if times == 1 else jax.tree.map(lambda s: s / times, statistics)


def _over_places(tap: Tap, u: Array) -> Array:
  axes = tuple(sorted(_joint(tap) & (varying(u) | (tap.site.differs & tap.site.unchecked))))
  return jax.lax.psum(u, axes) if axes else u


def _of_all(tap: Tap, sums: BlockSums) -> BlockSums:
  return sums if tap.by_shard or tap.operator.reduced is not None else tap.shards.of_all(sums)


def _of_site(op: Op, tap: Tap, values, dy: Array, known: Known, basis: Basis | None) -> BlockSums:
  """Returns what one site adds to the statistics of its block, shard by shard."""
  return _of_all(tap, _statistics(op, tap, values, dy, known, basis))


def _slope(op: Op, position: int, values: Sequence[Any], dy: Array) -> Array:
  """Returns the gradient of an operand entry by entry, not summed over the axes along which it is repeated."""
  full = list(values)

  def function(operand: Array) -> Array:
    full[position] = operand
    return bind(op, *full)[0]

  # Use the derivative of each entry: an operand that is broadcast here would have the type of a replicated array.
  operand = values[position]
  return dy * jax.jvp(function, (operand,), (jnp.ones_like(operand),))[1]


def _statistics(op: Op, tap: Tap, values, dy: Array, known: Known, basis: Basis | None) -> BlockSums:
  site, coefficient = tap.site, known.coefficient
  if site.kind == 'entrywise' and tap.lifted is not None:
    return _of_copies(tap, _slope(op, site.position, values, dy), known, basis)
  if site.kind == 'entrywise':
    gradients = [_of_examples(tap, _slope(op, site.position, values, dy), coefficient)]
    if len(tap.operator.layouts) == 2:
      gradients.append(by_example(accurate(dy), site.weight.axes) if tap.bias else jnp.zeros_like(gradients[0]))
    return _of_gradients(tap, gradients)
  if site.kind == 'gain':
    return _of_gradients(tap, [_of_gain(op, site, values, dy, coefficient)])
  side = Side(site.weight.scale)
  if coefficient is not None:
    matrix = site.linear.matrix(coefficient)
    along_rows = site.weight.varies <= set(site.linear.row_axes)  # a uniform scale goes to rows and spares the bias
    side = Side(rows=matrix[:, :, 0]) if along_rows else Side(columns=matrix[:, 0])
  x = values[1 - site.position]

  def of_rows(x, dy, where=None):
    masked_side = side
    if where is not None:
      masked_side = side._replace(where=site.linear.mask_rows(where, dy))
    return tap.operator.statistics(site.linear, x, dy, masked_side, tap.bias, tap.transposed, basis)

  there = []
  if known.where is not None:
    there = [site.linear.mask(known.where, x, dy)]
  if tap.shards.trivial or not tap.by_shard or tap.operator.reduced is not None:
    return of_rows(x, dy, *there)
  axes = site.linear.examples
  axes = [*axes, *axes[:1][: len(there)]]
  return tap.shards.of_each(of_rows, [x, dy, *there], axes, by_device=isinstance(site.linear, Conv))


def _of_gain(op: Op, site: Site, values, dy: Array, derivative: Array) -> Array:
  """Returns the gradient of each example with respect to a factor of the kernel: dy . y(dkernel/dfactor)."""
  full = list(values)
  full[site.position] = derivative.astype(values[site.position].dtype)
  along = accurate(bind(op, *full)[0]) * accurate(dy)
  shape = op.inputs[site.position].shape
  sums = site.linear.output_rows(along).sum(2)  # s b o
  sums = jnp.moveaxis(sums, 1, 0).reshape(-1, *(shape[a] for a in site.linear.column_axes))
  kept = tuple(1 + k for k, a in enumerate(site.linear.column_axes) if a in site.weight.axes)
  return by_example(sums, kept)


def floats(values: Sequence[Any]) -> list[Any]:
  """Returns the values that have gradients."""
  return [v for v in values if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]


def with_floats(values: Sequence[Any], floats: Sequence[Any], like: Sequence[Any] | None = None) -> list[Any]:
  """Replaces the values that have gradients by `floats`.

  The types in `like` tell which values have gradients. Without `like`, the types of the values themselves do.
  """
  others = iter(floats)
  kinds = values if like is None else like
  return [
    next(others) if jnp.issubdtype(jnp.result_type(k), jnp.inexact) else v for v, k in zip(values, kinds, strict=True)
  ]
