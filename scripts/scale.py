"""Shows how K-FAC's work, memory, traffic and program size grow with devices, from compilation alone.

python scripts/scale.py --out=docs/scale

The script writes tables and a JSON file. The model is ResNet-50 as in experiments/configs/imagenet_resnet50.py.
Programs are compiled for emulated devices, with a separate process for each count. Nothing runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.configs import digits
from kronmesh import kron, models, parallel
from kronmesh.train import jsonfile
from kronmesh.train.build import build
from kronmesh.train.planning.programs import abstract
from kronmesh.train.reporting.tables import columns
from scripts.losses import problem

_OUT = flags.DEFINE_string('out', None, 'Where to write OUT.txt and OUT.json; nothing is written without it.')
_DEVICES = flags.DEFINE_integer(
  'devices', 0, 'Compile on so many devices and print one JSON line; for the script itself.'
)
_MESH = flags.DEFINE_string('mesh', 'data=-1', 'With --devices: the mesh.')

COUNTS = (1, 2, 4, 8, 64, 512)
PLACEMENTS = {'COMM-OPT': False, 'MEM-OPT': True}  # name -> whether inverses are local
MESHES = ('data=8', 'data=4,model=2', 'data=2,fsdp=2,model=2')


def deals(blocks: Any) -> list[list[Any]]:
  """Returns rows for each placement and number of devices.

  A row has the busiest device's work and memory, and the numbers that travel at a refresh.
  """
  rows = []
  numbers = sum(f.rows * f.n * (f.n + 1) // 2 for b in blocks for f in b.operator.factors.values())
  for name, local_inverses in PLACEMENTS.items():
    for split in (False, True):
      for devices in COUNTS:
        deal = kron.Deal(devices, local_inverses and devices > 1, split)
        layout = kron.lay_out(blocks, deal)
        loaded, least = kron.load(layout), kron.least(blocks, deal)
        sizes = sorted(s.n for s in layout.stacks.values() if s.row_sharded)
        sent = sum(_travels(s) for s in layout.stacks.values())
        rows.append([
          name, 'yes' if split else 'no', devices, loaded.work / 1e9, loaded.work / least.work, loaded.memory * 4 / 2**20,
          loaded.memory / least.memory, sent / numbers, ' '.join(map(str, sizes)) or '-',
        ])  # fmt: skip
  return rows


def _travels(stack: kron.Stack) -> int:
  """Counts the numbers that travel to the owners of a stack."""
  if stack.row_sharded:  # half of each row, and the rest from its neighbours
    rows = stack.owners * stack.rows
    return stack.count * rows * (stack.n // 2 + 1 + stack.rows)
  slots = stack.count if stack.sparse else stack.owners * stack.slots
  return slots * stack.n * (stack.n + 1) // 2


def compiled(devices: int, mesh: str) -> dict[str, Any]:
  """Compiles the digits autoencoder's K-FAC step on emulated devices: program sizes, times and traffic."""
  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_enable_compilation_cache', False)
  config = digits.get_config()
  config.mesh = mesh
  config.data.batch_size = config.data.eval_batch_size = 512
  run = build(config)
  state, batch = abstract(run)
  result: dict[str, Any] = {'devices': devices, 'mesh': mesh}
  update = run.programs['update'], (state, state.params)
  plain = [(run.programs['gradient'], (state, batch, False)), update]
  refresh = [
    (run.programs['gradient'], (state, batch, True)),
    *run.inverse_schedule.programs(state.opt_state).values(),
    update,
  ]
  for step, programs in (('refresh', refresh), ('plain', plain)):
    result[step] = total([of_program(fn, args, run.mesh) for fn, args in programs])
  return result


def of_program(fn: Any, args: tuple, mesh: Any) -> dict[str, Any]:
  jax.clear_caches()
  start = time.perf_counter()
  lowered = fn.lower(*args)
  middle = time.perf_counter()
  program = lowered.compile()
  return {
    'trace_s': middle - start,
    'compile_s': time.perf_counter() - middle,
    'lowered': lowered.as_text().count(' = '),
    'compiled': program.as_text().count(' = '),
    'collectives': parallel.audit(program, mesh=mesh).summary(),
  }


def total(programs: list[dict[str, Any]]) -> dict[str, Any]:
  """Sums the numbers of programs that one step runs one after another."""
  result = {k: sum(p[k] for p in programs) for k in programs[0] if k != 'collectives'}
  collectives: dict[str, list[int]] = {}
  for per_program in (p['collectives'] for p in programs):
    for kind, (count, size) in per_program.items():
      before = collectives.get(kind, [0, 0])
      collectives[kind] = [before[0] + count, before[1] + size]
  return {**result, 'collectives': collectives}


def in_a_process(devices: int, mesh: str) -> dict[str, Any]:
  command = [sys.executable, __file__, f'--devices={devices}', f'--mesh={mesh}']
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  return json.loads(result.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
  del argv
  if _DEVICES.value:
    print(jsonfile.dumps(compiled(_DEVICES.value, _MESH.value)))
    return
  resnet50 = models.ResNet(blocks=(3, 4, 6, 3), classes=1000, dtype=jnp.bfloat16)
  loss, params, args = problem(resnet50, 64)
  rows = deals(kron.curvature(loss, params, *args, has_aux=True).blocks)
  repeats = [[in_a_process(n, 'data=-1') for n in (8, 512)] for _ in range(3)]
  sizes = []
  for step in ('refresh', 'plain'):
    for key in ('lowered', 'compiled', 'trace_s', 'compile_s'):
      ratios = sorted(many[step][key] / few[step][key] for few, many in repeats)
      sizes.append([step, key, repeats[0][0][step][key], repeats[0][1][step][key], ratios[1]])
  meshes = {mesh: in_a_process(8, mesh) for mesh in MESHES}
  traffic = []
  for mesh, row in meshes.items():
    for step in ('plain', 'refresh'):
      for name, (count, size) in row[step]['collectives'].items():
        traffic.append([mesh, step, name, count, size])
  text = '\n\n'.join([
    'ResNet-50: the busiest device at a refresh (work in 10^9 n^3, padding counted), its factors and inverses (MiB in\n'
    'float32), both against max(a fair share, the largest matrix); what travels to owners, in multiples of the packed '
    'factors',
    columns(['placement', 'split', 'devices', 'work', 'x least', 'MiB', 'x least', 'travels', 'split sizes'], rows),
    'The digits autoencoder on 8 and on 512 emulated devices: operations and seconds, and the median ratio of three',
    columns(['step', 'what', '8 devices', '512 devices', 'ratio'], sizes),
    'What the digits autoencoder communicates on 8 devices, batch 512: executions and bytes',
    columns(['mesh', 'step', 'collective', 'count', 'bytes'], traffic),
  ])  # fmt: skip
  print(text)
  if _OUT.value:
    Path(_OUT.value + '.txt').write_text(text + '\n')
    Path(_OUT.value + '.json').write_text(
      jsonfile.dumps({'deals': rows, 'compiled': repeats, 'meshes': meshes}, indent=1) + '\n'
    )


if __name__ == '__main__':
  app.run(main)
