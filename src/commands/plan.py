"""Forecasts the memory, flops and traffic of each device for a config on any machine, from compilation alone.

  kronmesh plan --config=resolution:8k --mesh=space=16
  kronmesh plan --config=noise:vit_b --devices=64 --memory=80

With --mesh, the forecast is for that mesh; without both flags, for the config's own. With --devices, the command searches
for the mesh of so many devices that communicates least and still fits into --memory. It lists the meshes that cannot be.

Nothing runs. No data are read, except graphs, whose size follows from their data. Memory is what XLA allocates for CPU
devices, where bfloat16 takes as much as float32, so a GPU needs less. --json prints the numbers."""

from __future__ import annotations

import math
from typing import Any

from ..train.runtime import xla  # isort: skip  (sets XLA's flags before JAX loads)

xla.for_plans()

from ..train.runtime.launch import launch  # isort: skip

import jax
from absl import flags

from ..train import jsonfile
from ..train.errors import ConfigError
from ..train.planning import forecast
from ..train.reporting.tables import columns

_MESH = flags.DEFINE_string('mesh', '', "The mesh, 'data=4,space=64'; the config's own if empty.")
_DEVICES = flags.DEFINE_integer(
  'devices', 0, 'Of how many devices the best mesh is searched; 0: of those of --mesh.', 0, 512
)
_MEMORY = flags.DEFINE_float('memory', 80.0, 'GiB of one device.', 0.0)
_JSON = flags.DEFINE_bool('json', False, 'Print the numbers in place of tables.')

MOST = 512


def devices_of(mesh: str) -> int:
  """Returns the number of devices of a mesh.

  Raises:
    ConfigError: the mesh leaves a size open, or has more devices than can be emulated.
  """
  sizes = [part.partition('=')[2].strip() for part in mesh.split(',') if part.strip()]
  if not sizes or not all(s.isascii() and s.isdigit() and int(s) for s in sizes):
    raise ConfigError(f'--mesh={mesh!r}: give every axis its size, as in data=4,space=16, or give --devices')
  if math.prod(map(int, sizes)) > MOST:
    raise ConfigError(f'--mesh={mesh!r} has {math.prod(map(int, sizes))} devices; at most {MOST} are emulated')
  return math.prod(map(int, sizes))


def main(config: Any, workdir: str) -> None:
  del workdir
  mesh = _MESH.value or (config.mesh if '-1' not in config.mesh else '')
  count = _DEVICES.value or devices_of(mesh or 'data=1')
  if _MESH.value and _DEVICES.value not in (0, devices_of(mesh)):
    raise ConfigError(f'--mesh={mesh!r} has {devices_of(mesh)} devices, --devices={_DEVICES.value}; give one of both')
  jax.config.update('jax_num_cpu_devices', count)
  jax.config.update('jax_enable_compilation_cache', False)
  limit = int(_MEMORY.value * 2**30)
  if _DEVICES.value and not _MESH.value:
    images = len(config.data.get('shape', ())) > 2 or config.data.name not in ('noise', 'poisson', 'python_text')
    search = forecast.search(config, count, limit, images)
  else:
    search = forecast.Search(forecast.forecast(config, mesh or 'data=1'), None, {})
  lines = forecast.advice(search.planned, config, limit)
  if _JSON.value:
    print(jsonfile.dumps(numbers(search, lines), indent=1))
  else:
    print(report(config, search, lines, limit))


def numbers(search: forecast.Search, lines: list[str]) -> dict[str, Any]:
  """Returns what --json prints."""
  planned = search.planned
  programs = {
    name: {**p._asdict(), 'memory': p.memory, 'gathers': [g._asdict() for g in p.gathers]}
    for name, p in planned.programs.items()
  }
  more = {'suggested': search.best, 'skipped': search.skipped, 'advice': lines}
  return {**planned._asdict(), 'programs': programs, 'memory': planned.memory, **more}


def report(config: Any, search: forecast.Search, lines: list[str], limit: int) -> str:
  """Returns what is printed: the mesh, the programs, their traffic, and what to change."""
  planned = search.planned
  mesh = ' x '.join(f'{axis} {n}' for axis, n in planned.mesh.items())
  parts = [
    f'{config.model.name} on {config.data.name}, {config.optimizer}, batch {config.data.batch_size}: {mesh}, compiled in '
    f'{planned.seconds:.0f} s',
    f'the busiest program takes {_gib(planned.memory)} GiB a device, of which the state has {_gib(planned.state)} '
    f'and a batch {_gib(planned.batch)}',
    _programs(planned),
    _traffic(planned),
    _gathered(planned),
  ]  # fmt: skip
  if planned.notes:
    parts.append('what does not divide\n' + '\n'.join(f'  {note}' for note in planned.notes))
  if search.skipped:
    parts.append('skipped\n' + '\n'.join(f'  {mesh}: {why}' for mesh, why in search.skipped.items()))
  if search.best is not None:
    parts.append(f'best mesh: --config.mesh={search.best}')
  elif _DEVICES.value and not _MESH.value:
    parts.append(f'no mesh of {_DEVICES.value} devices with {limit / 2**30:.0f} GiB was found; the least one is shown')
  parts += ['\n'.join(lines)] if lines else []
  return '\n\n'.join(parts)


def _gib(size: int) -> str:
  return f'{size / 2**30:.2f}'


def _of_inverses(planned: forecast.Forecast) -> dict[str, forecast.Compiled]:
  return {name: p for name, p in planned.programs.items() if name.startswith('inverses')}


def _programs(planned: forecast.Forecast) -> str:
  """Returns the table of programs; the many small ones for inverses share a row."""
  inverses = _of_inverses(planned)
  sizes = lambda p: [_gib(n) for n in (p.memory, p.held, p.temporaries, p.results)]  # noqa: E731
  rows = [
    [name, *sizes(p), f'{p.flops / 1e9:.4g}{"+" if p.loops else ""}']
    for name, p in planned.programs.items()
    if name not in inverses
  ]
  if inverses:
    most = max(inverses.values(), key=lambda p: p.memory)
    work = sum(p.flops for p in inverses.values())
    rows.append([f'inverses, {len(inverses)} programs', *sizes(most), f'{work / 1e9:.4g}'])
  table = columns(['program, on each device', 'GiB', 'held', 'temporary', 'results', 'Gflop'], rows)
  return table + ('\n+: loops are counted once' if any(p.loops for p in planned.programs.values()) else '')


def _traffic(planned: forecast.Forecast) -> str:
  inverses = _of_inverses(planned)
  traffic: dict[tuple[str, str], list[int]] = {}
  for name, p in planned.programs.items():
    for what, (count, size) in p.collectives.items():
      counted = traffic.setdefault(('inverses' if name in inverses else name, what), [0, 0])
      counted[0], counted[1] = counted[0] + count, counted[1] + size
  moved = [[name, what, count, f'{size / 2**20:.2f}'] for (name, what), (count, size) in sorted(traffic.items())]
  return columns(['program', 'collective', 'count', 'MiB'], moved) if moved else 'nothing is communicated'


def _gathered(planned: forecast.Forecast) -> str:
  """Returns what is gathered, each with its cause on a line of its own."""
  causes: dict[tuple[str, str], list[int]] = {}
  for p in planned.programs.values():
    for g in p.gathers:
      counted = causes.setdefault((g.axes, g.cause), [0, 0])
      counted[0], counted[1] = counted[0] + g.count, counted[1] + g.bytes * g.count
  lines = [
    f'gathered along {axes}, {count} times, {size / 2**20:.2f} MiB:\n  {cause}'
    for (axes, cause), (count, size) in sorted(causes.items())
  ]
  return '\n'.join(lines) or 'nothing is gathered'


def command() -> None:
  """Plans the config that the command line names."""
  launch(main)
