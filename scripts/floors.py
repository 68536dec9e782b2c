"""The least time of each part of a K-FAC step: flops over the machine's peak, or bytes over its bandwidth."""

from __future__ import annotations

from typing import Any

from kronmesh.train.build import Run
from kronmesh.train.runtime.machine import Machine


def floors(run: Run, here: Machine) -> dict[str, dict[str, float]]:
  """Returns the least seconds per step that each part takes on one device.

  statistics: half of each product, because it is symmetric; factors read and written once. Rows count as free, because
    they are already in memory.
  inverses: n^3 flops for an inverse by Cholesky (a third for the root, two for the inverse); factors read, inverses
    written.
  update: A^-1 V G^-1 for every kernel; inverses read.
  """
  settings = run.config[run.config.optimizer]
  size = lambda b: sum(f.rows * f.n**2 for f in b.operator.factors.values()) * 4  # noqa: E731
  blocks = run.curvature.blocks
  numbers = sum(size(b) for b in blocks)
  products = sum(b.flops for b in blocks) / 2 * settings.subsample / settings.statistics_every
  solves = sum(f.rows * f.n**3 for b in blocks for f in b.operator.factors.values()) / settings.inverses_every
  applies = sum(_apply_flops(b) for b in blocks)
  devices = run.mesh.size
  parts = {
    'statistics': (
      products / here.products / devices,
      2 * numbers / settings.statistics_every / here.bandwidth / devices,
    ),
    'inverses': (solves / here.solves / devices, 2 * numbers / settings.inverses_every / here.bandwidth / devices),
    'update': (applies / here.solves, numbers / here.bandwidth),
  }
  return {name: {'least': max(times), 'flops': times[0], 'bytes': times[1]} for name, times in parts.items()}


def _apply_flops(block: Any) -> int:
  """Counts the flops of the products with both inverses, where only blocks along the diagonal count."""
  factors = block.operator.factors
  if set(factors) != {'A', 'G'}:
    return 2 * sum(f.rows * f.n**2 for f in factors.values())
  a, g = factors['A'], factors['G']
  return 2 * a.slots * (a.parts * a.n**2 * g.size + g.parts * g.n**2 * a.size)
