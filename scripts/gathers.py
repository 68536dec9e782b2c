"""Writes what the statistics of real networks gather over the batch axes: docs/gathers.txt and a golden table.

python scripts/gathers.py --devices=8,64 --out=docs/gathers.txt --golden=tests/parallel/golden_real.json

For every architecture of tests/parallel/real_sizes.py, on a mesh with an axis `data` of emulated devices, it compiles
the gradient with statistics, the plain gradient, and both again for one device with the same batch. Nothing runs. It
prints the bytes that each of the first two programs moves, and the work of each device over its share of one device's
work.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import conftest  # isort: skip  # noqa: F401  (sets the tests' compiler flags, as for the golden table)

import jax
from absl import app, flags

from kronmesh.train import jsonfile
from kronmesh.train.reporting.tables import columns
from tests.parallel.real_sizes import ARCHITECTURES, Program, program

_DEVICES = flags.DEFINE_list('devices', ['8', '64'], 'Numbers of emulated devices.')
_ONLY = flags.DEFINE_multi_string('only', [], 'The name of an architecture; all by default.')
_FISHERS = flags.DEFINE_list('fishers', ['sampled'], 'Kinds of the Fisher: sampled, empirical or exact.')
_GOLDEN = flags.DEFINE_string('golden', None, 'The JSON file in which rows are added or replaced; none by default.')
_OUT = flags.DEFINE_string('out', None, 'The text file for the table of all rows of --golden; none by default.')

HEAD = ['architecture', 'Fisher', 'devices', 'batch', 'gathered', 'plain', 'summed', 'plain', 'share', 'plain']
TITLE = """Bytes that move over `data` in the gradient with statistics and in the plain one; a device's share of the work
gathered: by all-gathers, all-to-alls and permutes; summed: by all-reduces, in MB (jax {version}; nothing ran)
share: flops of one device, over 1/N of what one device needs for the batch; the plain gradient's if it gathers"""


def row(name: str, devices: int, fisher: str) -> dict[str, Any]:
  """Returns the golden table's row for one architecture."""
  case = ARCHITECTURES[name]()
  batch = case.each * devices
  sharded, one = (program(case, n, batch, fisher) for n in (devices, 1))
  plain = program(case, devices, batch, statistics=False)
  result = {
    'batch': batch,
    'statistics': recorded(sharded),
    'plain': recorded(plain),
    'flops': sharded.flops,
    'share': round(devices * sharded.flops / one.flops, 4),
  }
  if plain.gathered:  # the partitioner may then repeat work on every device that the statistics did not cause
    result['plain share'] = round(devices * plain.flops / program(case, 1, batch, statistics=False).flops, 4)
  return result


def recorded(compiled_program: Program) -> dict[str, list[int]]:
  """Returns (executions, bytes) of each kind of collective."""
  return {kind: list(numbers) for kind, numbers in compiled_program.audit.summary().items()}


def table(rows: Mapping[str, dict[str, Any]]) -> str:
  """Returns the rows of a golden table as text, in the order of `ARCHITECTURES`."""
  cells = []
  for key in sorted(rows, key=_place):
    name, fisher, devices = key.split(' | ')
    row = rows[key]
    sums = [_bytes(row[kind], 'all-reduce') for kind in ('statistics', 'plain')]
    others = [_bytes(row[kind]) - n for kind, n in zip(('statistics', 'plain'), sums, strict=True)]
    cells.append([name, fisher, devices, row['batch'], *others, *(n / 1e6 for n in sums)])
    cells[-1] += [row['share'], row.get('plain share', '')]
  return columns(HEAD, cells)


def _place(key: str) -> tuple[int, str, int]:
  name, fisher, devices = key.split(' | ')
  return list(ARCHITECTURES).index(name), fisher, int(devices)


def _bytes(collectives: Mapping[str, list[int]], kind: str = '') -> int:
  return sum(n for name, (_, n) in collectives.items() if name.startswith(kind))


def main(argv: list[str]) -> None:
  del argv
  counts = [int(n) for n in _DEVICES.value]
  jax.config.update('jax_num_cpu_devices', max(counts))
  jax.config.update('jax_enable_compilation_cache', False)
  version = '.'.join(jax.__version__.split('.')[:2])
  path = Path(_GOLDEN.value) if _GOLDEN.value else None
  tables = json.loads(path.read_text()) if path and path.exists() else {}
  rows = tables.setdefault(version, {})
  for name, fisher, devices in itertools.product(_ONLY.value or ARCHITECTURES, _FISHERS.value, counts):
    key = f'{name} | {fisher} | {devices}'
    start = time.perf_counter()
    rows[key] = row(name, devices, fisher)
    print(table({key: rows[key]}).splitlines()[-1], f'({time.perf_counter() - start:.0f} s)', flush=True)
    if path:
      path.write_text(jsonfile.dumps(tables, indent=1, sort_keys=True) + '\n')
  text = TITLE.format(version=jax.__version__) + '\n\n' + table(rows)
  print(text)
  if _OUT.value:
    Path(_OUT.value).write_text(text + '\n')


if __name__ == '__main__':
  app.run(main)
