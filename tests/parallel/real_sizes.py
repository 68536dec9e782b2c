"""Compiles the gallery's architectures at sizes of real networks for a mesh; nothing runs.

`ARCHITECTURES`: name -> function -> `Case`. `python -m tests.parallel.real_sizes NAME DEVICES` prints the row of one
architecture in JSON, with as many emulated devices.
"""

import json
import sys
from typing import Any, NamedTuple

if __name__ == '__main__':
  from tests import conftest  # isort: skip  # noqa: F401  (the tests' compiler flags)

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kronmesh import kron, parallel
from tests.parallel.real_cases import Case, leading
from tests.parallel.real_images import IMAGES
from tests.parallel.real_sequences import SEQUENCES

ARCHITECTURES = IMAGES | SEQUENCES


class Program(NamedTuple):
  """Holds the collectives of a compiled program and the flops of one device."""

  audit: parallel.Audit
  flops: float

  @property
  def gathered(self) -> int:
    """Counts the bytes that move other than as a sum; gradients of whole parameters move as sums."""
    return self.audit.bytes() - self.audit.bytes('all-reduce')


def program(
  case: Case, devices: int, batch: int, fisher: str = 'sampled', statistics: bool = True, placed: bool = True
) -> Program:
  """Compiles the gradient of `batch` examples over a mesh of so many devices, with its statistics if asked for."""
  mesh = parallel.make_mesh(f'data={devices}', jax.devices()[:devices])
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, state, key = (_on(mesh, tree) for tree in (case.params, case.state, key))
  args = params, state, _on(mesh, leading(batch, case.batch), 'data'), key
  fn: Any = jax.value_and_grad(case.loss)
  if statistics:
    placement = parallel.Placement(mesh) if placed else None
    fn = kron.curvature(case.loss, *args, fisher=fisher, placement=placement, **case.options).value_and_grad
  compiled = jax.jit(fn).lower(*args).compile()
  return Program(parallel.audit(compiled, mesh=mesh), compiled.cost_analysis()['flops'])


def _on(mesh, tree, *spec):
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def measured(name: str, devices: int, fisher: str = 'sampled') -> dict[str, Any]:
  """Returns the collectives of the program with statistics, as (executions, bytes), and the flops of one device."""
  case = ARCHITECTURES[name]()
  found = program(case, devices, case.each * devices, fisher)
  return {'collectives': {k: list(v) for k, v in found.audit.summary().items()}, 'flops': found.flops}


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', int(sys.argv[2]))
  print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
