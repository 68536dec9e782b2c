"""The least time that each part of a K-FAC step can take: flops over the machine's peak, bytes over its bandwidth."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.build import Run

# Dense peaks of NVIDIA's data sheets: flops a second in bf16 and TF32, bytes a second.
_GPUS = {'H100': (989e12, 495e12, 3.35e12), 'H200': (989e12, 495e12, 4.8e12), 'A100': (312e12, 156e12, 2.04e12)}


class Machine(NamedTuple):
  """What a device can do at most. products: flops a second of the statistics; solves: of the rest, in float32."""

  name: str
  products: float
  solves: float
  bandwidth: float
  timed: bool  # whether its times are worth telling

  @property
  def peaks(self) -> str:
    return f'{self.products / 1e12:.3g} and {self.solves / 1e12:.3g} Tflop/s, {self.bandwidth / 1e9:.3g} GB/s'


def machine(dtype: str) -> Machine:
  """The first device: by its data sheet, or measured by a product of two matrices and by a copy."""
  kind = jax.devices()[0].device_kind
  for name, (half, single, bandwidth) in _GPUS.items():
    if name in kind:
      return Machine(kind, half if dtype == 'bfloat16' else single, single, bandwidth, True)
  n, m = 2048, 2**25
  x, y = jnp.ones((n, n), jnp.float32), jnp.ones(m, jnp.float32)
  product, copy = least(lambda x: x @ x, x), least(lambda y: y + 1, y)
  return Machine(kind, 2 * n**3 / product, 2 * n**3 / product, 2 * 4 * m / copy, False)


def least(fn: Any, x: Any) -> float:
  """Seconds of the fastest of seven calls."""
  fn = jax.jit(fn)
  jax.block_until_ready(fn(x))
  times = []
  for _ in range(7):
    start = time.perf_counter()
    jax.block_until_ready(fn(x))
    times.append(time.perf_counter() - start)
  return min(times)


def floors(run: Run, here: Machine) -> dict[str, dict[str, float]]:
  """Seconds a step of each part at the very least, on one device.

  statistics: half of each product, as it is symmetric; factors read and written once. (Rows are counted as free: they are
    there.) inverses: n^3 flops for an inverse by Cholesky (a third for the root, two for the inverse); factors read,
    inverses written. update: A^-1 V G^-1 of every kernel; inverses read.
  """
  own = run.config[run.config.optimizer]
  size = lambda b: sum(f.rows * f.n**2 for f in b.operator.factors.values()) * 4  # noqa: E731
  blocks = run.curvature.blocks
  numbers = sum(size(b) for b in blocks)
  products = sum(b.flops for b in blocks) / 2 * own.part / own.statistics_every
  solves = sum(f.rows * f.n**3 for b in blocks for f in b.operator.factors.values()) / own.inverses_every
  applies = sum(_apply_flops(b) for b in blocks)
  devices = run.mesh.size
  parts = {
    'statistics': (products / here.products / devices, 2 * numbers / own.statistics_every / here.bandwidth / devices),
    'inverses': (solves / here.solves / devices, 2 * numbers / own.inverses_every / here.bandwidth / devices),
    'update': (applies / here.solves, numbers / here.bandwidth),
  }
  return {name: {'least': max(times), 'flops': times[0], 'bytes': times[1]} for name, times in parts.items()}


def _apply_flops(block: Any) -> int:
  """Of the products with both inverses, blocks along the diagonal counted as such."""
  factors = block.operator.factors
  if set(factors) != {'A', 'G'}:
    return 2 * sum(f.rows * f.n**2 for f in factors.values())
  a, g = factors['A'], factors['G']
  return 2 * a.slots * (a.parts * a.n**2 * g.size + g.parts * g.n**2 * a.size)
