"""The probes of a program, which carry zeros for each statistic and the data that the statistics need.

The loops that slice a probe slice everything on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ...program import vary, varying
from ..operators import Kronecker, Unit, Unitwise
from ..statistics import BlockSums

Basis = Mapping[str, Array]  # the eigenvectors of A and G


class Probe(NamedTuple):
  """The extra argument of the operations at the sites of one block.

  products, uses: zeros, whose cotangents are the block's statistics.
  basis: the eigenvectors of A and G if second moments in that basis are wanted, else empty.
  due: for each statistic a number that is 0 where the statistic is not wanted; empty if all are wanted.
  """

  products: dict[str, Array]
  uses: dict[str, Array]
  basis: dict[str, Array]
  due: dict[str, Array]


Probes = dict[str, Probe]  # keyed by block


def zero_probe(shapes: BlockSums, dtype: Any) -> Probe:
  """Returns a probe for statistics of these shapes."""
  zeros = lambda shape: jnp.zeros(shape, dtype)  # noqa: E731
  counts = {k: jnp.zeros(shape, jnp.float32) for k, shape in shapes.uses.items()}
  return Probe({k: zeros(shape) for k, shape in shapes.products.items()}, counts, {}, {})


def with_basis(
  probe: Probe, operator: Kronecker | Unitwise, basis: Basis, loops: tuple[int, ...], lead: tuple[int, ...], dtype: Any
) -> Probe:
  """Adds a probe for second moments in a basis, and the basis itself.

  loops: the lengths of the loops that slice the block. The new probe and the basis have them as leading axes, as the
    probe of A does.
  lead: the axis of shards, if there is one.
  """
  vectors = {k: u.reshape(*loops, -1, *u.shape[1:]) for k, u in basis.items()}
  products = dict(probe.products)
  if operator.reduced is None:
    products['S'] = jnp.zeros((*loops, *lead, *operator.moments), dtype)
  return probe._replace(products=products, basis=vectors)


def with_due(
  probe: Probe, operator: Kronecker | Unitwise | Unit, due: Mapping[str, Array], loops: tuple[int, ...]
) -> Probe:
  """Flags whether each statistic is due, once for each iteration of the loops that slice the block.

  The uses of a transposed kernel make both factors, so all of its statistics are due together. Rows that are summed
  later (*reduce*) are always wanted.
  """
  if operator.reduced is not None:
    return probe
  kinds = [k for k in probe.products if k != 'S']
  if operator.transposed:
    due = dict.fromkeys(kinds, functools.reduce(jnp.logical_or, due.values()))
  return probe._replace(due={k: jnp.full(loops, due[k], jnp.float32) for k in kinds})


def where_due(due: Mapping[str, Array], statistics: Callable[[], BlockSums]) -> BlockSums:
  """Returns the statistics, each of which the device computes only if its factor is due."""
  computed = statistics()
  if not due:
    return computed

  # Of the statistics computed above, only those without a flag are kept.
  def one(name: str, like: Array) -> Array:
    nothing = lambda: vary(jnp.zeros(like.shape, like.dtype), varying(like))  # noqa: E731
    return jax.lax.cond(due[name] > 0, lambda: statistics().products[name], nothing)

  products = {k: one(k, s) if k in due else s for k, s in computed.products.items()}
  return computed._replace(products=products)


def cotangent(probe: Probe, block_sums: Sequence[BlockSums]) -> Probe:
  """Returns the probe's cotangent, which sums each statistic over `found` in the type and shape of the probe."""

  def total(zeros: Mapping[str, Array], parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    sums = {}
    for k, z in zeros.items():
      terms = [p[k].astype(z.dtype).reshape(z.shape) for p in parts if k in p]
      sums[k] = vary(sum(terms[1:], start=terms[0]), varying(z)) if terms else jnp.zeros_like(z)
    return sums

  rest = jax.tree.map(jnp.zeros_like, (probe.basis, probe.due))
  return Probe(
    total(probe.products, [f.products for f in block_sums]), total(probe.uses, [f.uses for f in block_sums]), *rest
  )
