"""What the probes of a program carry: zeros for each statistic, and what the statistics need to know to be taken.

Whatever rides on a probe is sliced by the loops that slice it.
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

Basis = Mapping[str, Array]  # eigenvectors of A and G


class Probe(NamedTuple):
  """What rides on the operations at the sites of one block.

  products, uses: zeros, whose cotangents are the block's statistics.
  basis: eigenvectors of A and G, where second moments in that basis are wanted; else empty.
  due: by statistic a number that is 0 where it is not wanted; empty where all are.
  """

  products: dict[str, Array]
  uses: dict[str, Array]
  basis: dict[str, Array]
  due: dict[str, Array]


Probes = dict[str, Probe]  # by block


def zero_probe(shapes: BlockSums, dtype: Any) -> Probe:
  """Returns a probe for statistics of these shapes."""
  zeros = lambda shape: jnp.zeros(shape, dtype)  # noqa: E731
  counts = {k: jnp.zeros(shape, jnp.float32) for k, shape in shapes.uses.items()}
  return Probe({k: zeros(shape) for k, shape in shapes.products.items()}, counts, {}, {})


def with_basis(
  probe: Probe, operator: Kronecker | Unitwise, basis: Basis, loops: tuple[int, ...], lead: tuple[int, ...], dtype: Any
) -> Probe:
  """Adds a probe for second moments in a basis, and the basis, laid out by the loops that slice the block as A's is.

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
  """Adds for each statistic whether it is due, once for each iteration of the loops that slice the block.

  The uses of a transposed kernel make both factors, so all its statistics are due together; rows that are still to be
  summed (*reduce*) are always wanted.
  """
  if operator.reduced is not None:
    return probe
  own = [k for k in probe.products if k != 'S']
  if operator.transposed:
    due = dict.fromkeys(own, functools.reduce(jnp.logical_or, due.values()))
  return probe._replace(due={k: jnp.full(loops, due[k], jnp.float32) for k in own})


def where_due(due: Mapping[str, Array], statistics: Callable[[], BlockSums]) -> BlockSums:
  """The statistics, each computed on the device only if its factor is due."""
  computed = statistics()
  if not due:
    return computed

  # Of those computed only what has no flag is kept.
  def one(name: str, like: Array) -> Array:
    nothing = lambda: vary(jnp.zeros(like.shape, like.dtype), varying(like))  # noqa: E731
    return jax.lax.cond(due[name] > 0, lambda: statistics().products[name], nothing)

  products = {k: one(k, s) if k in due else s for k, s in computed.products.items()}
  return computed._replace(products=products)


def cotangent(probe: Probe, found: Sequence[BlockSums]) -> Probe:
  """The probe's cotangent: of each statistic the sum of what was found, in the probe's own type and shape."""

  def total(zeros: Mapping[str, Array], parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    sums = {}
    for k, z in zeros.items():
      own = [p[k].astype(z.dtype).reshape(z.shape) for p in parts if k in p]
      sums[k] = vary(sum(own[1:], start=own[0]), varying(z)) if own else jnp.zeros_like(z)
    return sums

  rest = jax.tree.map(jnp.zeros_like, (probe.basis, probe.due))
  return Probe(total(probe.products, [f.products for f in found]), total(probe.uses, [f.uses for f in found]), *rest)
