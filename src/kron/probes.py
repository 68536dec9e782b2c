"""What the probes of a program carry: zeros for each statistic, and what the statistics need to know to be taken.

Whatever rides on a probe is sliced by the loops that slice it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

if TYPE_CHECKING:
  from .blocks import Block
from ..program import vary, varying
from .statistics import COUNTS

Probes = dict[str, dict[str, Array]]  # by block and statistic
Basis = Mapping[str, Array]  # eigenvectors of A and G
BASIS = 'basis '
DUE = 'due '  # a probe of this name and a factor's: 0 where the factor's statistics are not wanted


def moment_probes(
  block: Block, loops: tuple[int, ...], lead: tuple[int, ...], basis: Mapping[str, Array]
) -> dict[str, Array]:
  """For second moments in a basis: their probe, and the basis laid out by the loops that slice the block as A's is.

  lead: the axis of shards, if there is one.
  """
  found = {BASIS + k: u.reshape(*loops, -1, *u.shape[1:]) for k, u in basis.items()}
  if block.operator.reduced is None:
    found['S'] = jnp.zeros((*loops, *lead, *block.operator.moments), block.dtype)
  return found


def due_probes(
  block: Block, probes: Mapping[str, tuple], loops: tuple[int, ...], due: Mapping[str, Array]
) -> dict[str, Array]:
  """For each statistic a flag, one for each iteration of the loops that slice the block.

  The uses of a transposed kernel make both factors, so all its statistics are due together; rows that are still to be
  summed (*reduce*) are always wanted.
  """
  if block.operator.reduced is not None:
    return {}
  own = [k for k in probes if not k.startswith(COUNTS)]
  if block.operator.transposed:
    together = functools.reduce(jnp.logical_or, due.values())
    due = dict.fromkeys(own, together)
  return {DUE + k: jnp.full(loops, due[k], jnp.float32) for k in own}


def basis_of(probe: dict[str, Array]) -> Basis | None:
  """The eigenvectors that came with the probe, so that loops slice them as they slice it."""
  found = {k.removeprefix(BASIS): v for k, v in probe.items() if k.startswith(BASIS)}
  return found or None


def where_due(probe: dict[str, Array], statistics: Callable[[], dict[str, Array]]) -> dict[str, Array]:
  """The statistics, each computed on the device only if its factor is due."""
  if not any(k.startswith(DUE) for k in probe):
    return statistics()

  computed = statistics()  # of these only what has no flag is kept

  def one(name: str, like: Array) -> Array:
    nothing = lambda: vary(jnp.zeros(like.shape, like.dtype), varying(like))  # noqa: E731
    return jax.lax.cond(probe[DUE + name] > 0, lambda: statistics()[name], nothing)

  return {k: one(k, s) if DUE + k in probe else s for k, s in computed.items()}


def cotangent(probe: dict[str, Array], found: list[dict[str, Array]]) -> dict[str, Array]:
  """The probe's cotangent: of each statistic the sum of what was found, in the probe's own type and shape."""
  sums = {}
  for k, z in probe.items():
    parts = [f[k].astype(z.dtype).reshape(z.shape) for f in found if k in f]
    sums[k] = vary(sum(parts[1:], start=parts[0]), varying(z)) if parts else jnp.zeros_like(z)
  return sums
