"""Evaluates a program with a probe at every site, so that its gradient carries the statistics.

Each site's operation is replaced by a twin with the same value and the same derivatives, and one more argument, the
probe: zeros shaped like the site's factors. The probe changes nothing in the forward pass; its cotangent is defined to
be the site's statistics. Sums over microbatches, shards and loops are then what autodiff does with any cotangent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .operators import Kronecker, Unit
from .operators.factor import accurate
from .program import Op, Program, Ref, bind, observe_p, rematerialise
from .sites import Site


class Tap(NamedTuple):
  """A site whose statistics belong to the block of this name."""

  block: str
  site: Site
  operator: Kronecker | Unit


Probes = dict[str, dict[str, Array]]


def evaluate(
  program: Program,
  taps: Mapping[int, Tap],
  chains: Mapping[int, tuple[Op, int]],
  inputs: Sequence[Array],
  probes: Probes,
) -> tuple[list[Array], list[tuple[Array, ...]]]:
  """The program's outputs, and the operands of its observation marks in order.

  Args:
    program: as traced.
    taps: by site key.
    chains: the survey's: how a scaled weight was made.
    inputs: values for the program's inputs.
    probes: zeros, by block and factor.
  """
  env: dict[int, Any] = dict(program.consts)
  env.update({v.index: value for v, value in zip(program.inputs, inputs, strict=True)})
  marks: list[tuple[Array, ...]] = []

  def read(value: Any) -> Any:
    return env[value.index] if isinstance(value, Ref) else value

  def coefficient(value: Ref, site: Site) -> Array | float:
    """d value / d parameter, entry by entry: the weight's own history, applied to ones."""
    if value.index not in chains:
      at_site = value.index == site.op.inputs[site.position].index
      return site.weight.scale if at_site else jnp.full(value.shape, site.weight.scale, value.dtype)
    op, i = chains[value.index]
    if op.name in ('add', 'sub'):
      return coefficient(op.inputs[i], site)
    operands = [coefficient(v, site) if j == i else read(v) for j, v in enumerate(op.inputs)]
    return bind(op, *operands)[0]

  for op in program.ops:
    values = [read(v) for v in op.inputs]
    tap = taps.get(op.outputs[0].index) if op.outputs else None
    if op.body is not None:

      def region(values, probes, op=op):
        return evaluate(op.body, taps, chains, values, probes)

      results, inner = rematerialise(op, region)(values, probes)
      marks += inner
    elif op.name == observe_p.name:
      marks.append(tuple(values))
      results = values[:1]
    elif tap is not None:
      c = coefficient(op.inputs[tap.site.position], tap.site)
      results = [_tapped(op, tap, values, probes[tap.block], c)]
    else:
      results = bind(op, *values)
    env.update({v.index: result for v, result in zip(op.outputs, results, strict=True)})
  return [read(v) for v in program.outputs], marks


def _tapped(op: Op, tap: Tap, values: list[Any], probe: dict[str, Array], coefficient: Array | float) -> Array:
  """The site's operation with its probe."""
  position = tap.site.position

  def operator(x, w):
    return bind(op, *((w, x) if position == 0 else (x, w)))[0]

  known = (accurate(jax.lax.stop_gradient(coefficient)),) if isinstance(coefficient, jax.Array) else ()

  @jax.custom_vjp
  def twin(x, w, probe, *known):
    del probe, known
    return operator(x, w)

  def forward(x, w, probe, *known):
    y, pull = jax.vjp(operator, x, w)
    return y, (pull, x, known)

  def backward(residuals, dy):
    pull, x, known = residuals
    factor = 1 / x if op.name == 'div' else x
    statistics = tap.operator.statistics(factor, dy, known[0] if known else coefficient)
    statistics = {name: s.astype(probe[name].dtype) for name, s in statistics.items()}
    return *pull(dy), statistics, *(jnp.zeros_like(c) for c in known)

  twin.defvjp(forward, backward)
  return twin(values[1 - position], values[position], probe, *known)
