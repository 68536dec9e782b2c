"""Compares the memory that `kronmesh plan` forecasts with that of real steps, for several configs.

  python scripts/check_plan.py --out=docs/plan

Each config has a separate process. A step of each kind runs on CPU devices. The script compares the forecast with the
process's peak memory during the step, less the memory that it held before the state was made.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import xla  # isort: skip  (sets XLA's flags before JAX loads)

xla.for_plans()

from kronmesh.train.runtime.launch import launch  # isort: skip

import jax
from absl import flags

from kronmesh.train import jsonfile
from kronmesh.train.build import Run, build
from kronmesh.train.planning import forecast
from kronmesh.train.planning.programs import abstract, programs_of
from kronmesh.train.reporting.tables import columns

_OUT = flags.DEFINE_string(
  'out', None, 'Where to write OUT/checked.txt and OUT/checked.json; nothing is written without it.'
)
_ONE = flags.DEFINE_string('mesh', '', "The config's own step on this mesh, as one JSON line; for the script itself.")

# Config, mesh, changes. The steps take half a GB or more, so that the interpreter's memory matters little. The last
# ones are convolutional: on a CPU their gradients also take memory of Eigen, which is not part of XLA's plan.
CASES = (
  ('noise.py:autoencoder', 'data=1', ('data.batch_size=65536',)),
  ('noise.py:autoencoder', 'data=2', ('data.batch_size=65536', 'optimizer=adam')),
  ('noise.py:small_vit', 'data=1', ('data.batch_size=2048',)),
  ('noise.py:small_vit', 'data=1', ('data.batch_size=4096', 'model.keep=blocks')),
  ('noise.py:small_vit', 'data=2,space=2', ('data.batch_size=2048',)),
  ('noise.py:small_gpt2', 'data=1', ('data.batch_size=256',)),
  ('noise.py:small_gpt2', 'data=2,fsdp=2', ('data.batch_size=256',)),
  ('noise.py:small_resnet', 'data=1', ('data.batch_size=2048',)),
  ('resolution.py:small_4k', 'data=1', ()),
  ('resolution.py:small_4k', 'space=4', ()),
)


def peak(path: str = '/proc/self/status') -> int:
  """Returns the most memory that the process has held since `reset_peak`, in bytes."""
  line = next(line for line in Path(path).read_text().splitlines() if line.startswith('VmHWM'))
  return int(line.split()[1]) * 1024


def reset_peak() -> None:
  Path('/proc/self/clear_refs').write_text('5')


def measured(config: Any, mesh: str) -> dict[str, Any]:
  """Returns the forecast for all devices together, and the memory that the process took for the same programs."""
  count = 1
  for part in mesh.split(','):
    count *= int(part.partition('=')[2])
  jax.config.update('jax_num_cpu_devices', count)
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  config.mesh = mesh
  planned = forecast.forecast(config, mesh)
  run = build(config)
  batch = next(run.train_batches(0, 0))
  batch_bytes = sum(x.nbytes for x in jax.tree.leaves(batch))
  names = [name for name in planned.programs if not name.startswith('inverses')]
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
  compiled = {name: fn.lower(*args).compile() for name, (fn, args) in _programs(run).items() if name in names}
  result = {}
  for name, program in compiled.items():
    if name == 'update':
      continue
    jax.block_until_ready(program(run.init(0), batch)[1:])  # memory that the first run keeps is not part of a step
    before = held()
    state = jax.block_until_ready(run.init(0))
    reset_peak()
    jax.block_until_ready(program(state, batch)[1:])
    result[name] = {'measured': peak() - before + batch_bytes, 'planned': planned.programs[name].memory * count}
  return result


def _programs(run: Run) -> dict[str, tuple]:
  state, batch = abstract(run)
  return programs_of(run, state, batch)


def held() -> int:
  """Returns the memory that the process holds now, in bytes, after it has returned freed memory."""
  gc.collect()
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmRSS'))
  return int(line.split()[1]) * 1024


def main(config: Any, workdir: str) -> None:
  del workdir
  if _ONE.value:
    print(jsonfile.dumps(measured(config, _ONE.value)))
    return
  rows, totals = [], []
  for name, mesh, changes in CASES:
    path = f'experiments/configs/{name}'
    command = [sys.executable, __file__, f'--config={path}', f'--mesh={mesh}', *(f'--config.{c}' for c in changes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
      raise SystemExit(f'{name} on {mesh}: {done.stderr.splitlines()[-1]}')
    outcome = json.loads(done.stdout.splitlines()[-1])
    totals.append({'config': name, 'mesh': mesh, 'changes': changes, 'programs': outcome})
    for program, numbers in outcome.items():
      ratio = numbers['planned'] / numbers['measured']
      words = ' '.join((name, *changes))
      rows.append(
        [
          words,
          mesh,
          program,
          f'{numbers["planned"] / 2**20:.0f}',
          f'{numbers["measured"] / 2**20:.0f}',
          f'{ratio:.3f}',
        ]
      )
  text = columns(['config', 'mesh', 'program', 'planned, MiB', 'measured, MiB', 'ratio'], rows)
  print(text)
  if _OUT.value:
    Path(_OUT.value).mkdir(parents=True, exist_ok=True)
    Path(_OUT.value, 'checked.txt').write_text(text + '\n')
    Path(_OUT.value, 'checked.json').write_text(jsonfile.dumps(totals, indent=1) + '\n')


if __name__ == '__main__':
  launch(main)
