"""Prints the size of a step's program on so many emulated devices: python -m tests.parallel.program_size 512 mlp"""

import json
import sys

from tests import conftest  # isort: skip  # noqa: F401

import jax
import jax.numpy as jnp

from kronmesh import parallel
from tests.parallel.problems import arguments, compiled, problems

if __name__ == '__main__':
  devices, name = int(sys.argv[1]), sys.argv[2]
  jax.config.update('jax_num_cpu_devices', devices)
  case = compiled(problems(jnp.float32, batch=devices)[name], parallel.make_mesh('data=-1'))
  lowered = case.step.lower(*arguments(case))
  sizes = {'lowered': lowered.as_text().count(' = '), 'compiled': lowered.compile().as_text().count(' = ')}
  print(json.dumps(sizes))
