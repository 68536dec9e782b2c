"""Peak throughput of the devices of this machine."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dense peaks from the makers' data sheets: flops per second in bf16 and TF32 (TPUs: bf16 for both), bytes per second.
_PEAKS = {
  'H100': (989e12, 495e12, 3.35e12),
  'H200': (989e12, 495e12, 4.8e12),
  'A100': (312e12, 156e12, 2.04e12),
  'TPU v4': (275e12, 275e12, 1.2e12),
  'TPU v5 lite': (197e12, 197e12, 0.82e12),
  'TPU v5': (459e12, 459e12, 2.77e12),
  'TPU v6 lite': (918e12, 918e12, 1.64e12),
}


class Machine(NamedTuple):
  """Peak throughput of a device. products: flops per second for the statistics; solves: for the rest, in float32."""

  name: str
  products: float
  solves: float
  bandwidth: float
  timed: bool  # whether its times are worth reporting

  @property
  def peaks(self) -> str:
    return f'{self.products / 1e12:.3g} and {self.solves / 1e12:.3g} Tflop/s, {self.bandwidth / 1e9:.3g} GB/s'


def machine(dtype: str) -> Machine:
  """Returns the peaks of the first device, from its data sheet or measured with a matrix product and a copy."""
  kind = jax.devices()[0].device_kind
  for name, (half, single, bandwidth) in _PEAKS.items():
    if name in kind:
      return Machine(kind, half if dtype in ('bfloat16', 'float16') else single, single, bandwidth, True)
  n, m = 2048, 2**25
  x, y = jnp.ones((n, n), jnp.float32), jnp.ones(m, jnp.float32)
  product, copy = least(lambda x: x @ x, x), least(lambda y: y + 1, y)
  return Machine(kind, 2 * n**3 / product, 2 * n**3 / product, 2 * 4 * m / copy, False)


def peak(dtype: str, devices: int) -> float:
  """Returns the peak flops per second of `devices` devices together.

  Emulated devices share one machine. Its peak is measured, which takes about 0.2 s.
  """
  kind = jax.devices()[0].device_kind
  if any(name in kind for name in _PEAKS):
    return machine(dtype).products * devices
  n = 1024
  return 2 * n**3 / least(lambda x: x @ x, jnp.ones((n, n), jnp.float32))


def least(fn: Any, x: Any) -> float:
  """Returns the seconds that the fastest of seven calls took."""
  fn = jax.jit(fn)
  jax.block_until_ready(fn(x))
  times = []
  for _ in range(7):
    start = time.perf_counter()
    jax.block_until_ready(fn(x))
    times.append(time.perf_counter() - start)
  return min(times)
