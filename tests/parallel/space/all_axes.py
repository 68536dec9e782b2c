"""For test_pipeline.py: five K-FAC steps on a mesh of all axes, 32 devices, beside one device; prints the errors."""

import json
import os

os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401

import jax

jax.config.update('jax_num_cpu_devices', 32)
jax.config.update('jax_enable_x64', True)
jax.config.update('jax_cpu_enable_async_dispatch', False)

import jax.numpy as jnp

from kronmesh import parallel
from tests.parallel.problems import apart, arguments, compiled, five_steps
from tests.parallel.space.test_pipeline import problem


def on(mesh):
  return compiled(problem(jnp.float64), mesh, jnp.float64)


if __name__ == '__main__':
  whole = five_steps(on(parallel.make_mesh('data=1', jax.devices()[:1])), steps=3)
  everywhere = on(parallel.make_mesh('data=2,fsdp=2,model=2,space=2,pipe=2'))
  traffic = parallel.audit(everywhere.plain, *arguments(everywhere), mesh=everywhere.mesh)
  assert all(traffic.select(axis=axis) for axis in everywhere.mesh.axis_names), traffic.summary()
  print(json.dumps(apart(five_steps(everywhere, steps=3), whole)))
