"""One process of a group: trains a problem on a mesh of all their devices and writes what came of it.

python -m tests.parallel.worker ADDRESS PROCESSES NUMBER DEVICES MESH DTYPE OUT MODEL...
"""

import sys

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import jax
import jax.numpy as jnp
import numpy as np

from kronmesh import parallel
from tests.parallel.problems import compiled, five_steps, problems


def main(address, processes, number, devices, spec, dtype, out, *names):
  jax.config.update('jax_num_cpu_devices', int(devices))
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  jax.config.update('jax_enable_x64', dtype == 'float64')
  jax.distributed.initialize(address, int(processes), int(number), shutdown_timeout_seconds=10)
  assert jax.process_count() == int(processes) and jax.device_count() == int(processes) * int(devices)
  dtype = jnp.dtype(dtype)
  for name in names:
    found = five_steps(compiled(problems(dtype)[name], parallel.make_mesh(spec), dtype))
    if jax.process_index() == 0:
      np.savez(f'{out}/{name}.npz', **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
