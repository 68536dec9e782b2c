"""Forecasts of what a config takes on a mesh that is not at hand: memory, flops and traffic of each device.

They come from compilation alone. Programs are compiled for emulated CPU devices, and XLA partitions them as it does for
other devices. `kronmesh plan` says what differs: bfloat16 is float32 there, and fusions differ.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from ... import kron, parallel
from ..build import Run, build
from ..errors import ConfigError
from .programs import abstract, held, programs_of


class Gather(NamedTuple):
  """A gather of a program, and the reason for it."""

  program: str
  axes: str
  bytes: int
  count: int
  what: str
  cause: str


class Compiled(NamedTuple):
  """A program compiled for one device; sizes are in bytes.

  held: parameters, optimiser state and batch. temporaries: memory that is used while it runs. results: outputs that do
    not reuse an argument's memory.
  collectives: 'all-reduce over data' -> (executions, bytes).
  """

  held: int
  temporaries: int
  results: int
  flops: float
  loops: bool
  collectives: dict[str, tuple[int, int]]
  gathers: list[Gather]

  @property
  def memory(self) -> int:
    return self.held + self.temporaries + self.results


class Forecast(NamedTuple):
  """All programs of a run, by name. seconds: the time that the forecast took."""

  mesh: dict[str, int]
  programs: dict[str, Compiled]
  state: int
  batch: int
  notes: list[str]
  seconds: float

  @property
  def memory(self) -> int:
    """The memory of the program that needs most."""
    return max(p.memory for p in self.programs.values())


def forecast(config: Any, mesh: str) -> Forecast:
  """Compiles all programs of a config on a mesh of the emulated devices.

  Raises:
    ConfigError, MeshError, CurvatureError: as in `build`.
  """
  start = time.perf_counter()
  config = config.copy_and_resolve_references()
  config.mesh = mesh
  said: list[str] = []
  with _listening(said):
    run = build(config, load=False)
  state, batch = abstract(run)
  compiled: dict[str, Compiled] = {}
  with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # each program is compiled while the next is traced
    waiting = {}
    for name, (fn, args) in programs_of(run, state, batch).items():
      waiting[name] = pool.submit(lambda low: low.compile(), fn.lower(*args))
    for name, program in waiting.items():
      compiled[name] = _compiled(name, program.result(), run, state, batch)
  notes = [*_uneven(run), *dict.fromkeys(said)]
  return Forecast(dict(run.mesh.shape), compiled, held(state), held(batch), notes, time.perf_counter() - start)


class _listening:
  """A context that captures logged warnings, such as those about parameter axes that do not divide."""

  def __init__(self, said: list[str]):
    self.said = said

  def __enter__(self) -> None:
    self.filter = lambda record: self.said.append(record.getMessage()) or False
    logging.getLogger('kronmesh').addFilter(self.filter)

  def __exit__(self, *_: Any) -> None:
    logging.getLogger('kronmesh').removeFilter(self.filter)


def _compiled(name: str, program: Any, run: Run, state: Any, batch: Any) -> Compiled:
  memory, cost = program.memory_analysis(), program.cost_analysis() or {}
  audit = parallel.audit(program, mesh=run.mesh)
  # Gradients that another program made are held too.
  resident = held(state) + held(batch) + (held(state.params) if name.startswith(('update', 'inverses')) else 0)
  return Compiled(
    held=resident,
    temporaries=memory.temp_size_in_bytes,
    results=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
    flops=cost.get('flops', 0.0),
    loops=any(c.count > 1 for c in audit) or ' while(' in program.as_text(),
    collectives=audit.summary(),
    gathers=list(_gathers(name, audit, run, state)),
  )


def _gathers(name: str, audit: parallel.Audit, run: Run, state: Any) -> Iterator[Gather]:
  """Yields every gather with its cause, told by what it gathers if possible, else by its source line."""
  names = kron.param_names(state.params)
  shapes = dict(zip((_shape(x.shape) for x in jax.tree.leaves(state.params)), names, strict=True))
  for c in audit.select('all-gather'):
    param = next((shapes[s] for s in map(_dims, c.shapes) if s in shapes), None)
    if name.startswith('inverses'):
      cause = 'inverses go from their owners to the devices that use them (config.placement.inverses)'
    elif param is not None:
      cause = f'parameters that lie along {c.axes}, or their gradients, are used whole'
    elif set(run.strips) and {'space', 'columns'} & set(c.axes.split(',')):
      cause = f'activations, at {c.source}; report it: nothing is to be gathered along strips'
    else:
      cause = f'activations or gradients that XLA puts together at {c.source}'
    yield Gather(name, c.axes, c.bytes, c.count, ' '.join(c.shapes)[:80], cause)


def _dims(shape: str) -> str:
  return re.sub(r'^\w+', '', shape)


def _shape(shape: tuple[int, ...]) -> str:
  return f'[{",".join(map(str, shape))}]'


def _uneven(run: Run) -> Iterator[str]:
  for dim, s in run.strips.items():
    if not s.even:
      spare = s.shards * s.rows - s.size
      yield (
        f'axis {dim} of the images, {s.size} rows over {s.axis}={s.shards}: strips of {s.rows}, {spare} rows '
        f'({spare / s.size:.1%}) of padding; {_divisors(s.size, s.shards)} would divide'
      )


def _divisors(size: int, near: int) -> str:
  """Returns the nearest numbers of shards that divide, below and above."""
  below = next(n for n in range(near, 0, -1) if size % n == 0)
  above = next((n for n in range(near, size + 1) if size % n == 0), size)
  return f'{below} or {above}'


def advice(estimate: Forecast, config: Any, limit: int) -> list[str]:
  """Returns what to change so that a device's memory, `limit` bytes, suffices."""
  if estimate.memory <= limit:
    return []
  over = estimate.memory / limit
  result = [f'{estimate.memory / 2**30:.1f} GiB a device where {limit / 2**30:.0f} are allowed:']
  temporaries = max(p.temporaries for p in estimate.programs.values())
  if config.model.get('keep', 'blocks') == 'all':
    result.append('  activations are all kept: --config.model.keep=blocks computes them again')
  if config.data.batch_size > _size(estimate.mesh, 'data', 'fsdp') * config.microbatches:
    parts = config.microbatches * 2 ** math.ceil(math.log2(over))
    result.append(f'  a batch in parts: --config.microbatches={parts} divides what activations take')
  if temporaries > estimate.state:
    result.append(
      f'  activations take most ({temporaries / 2**30:.1f} GiB): --mesh with {math.ceil(over)} times the space (or data)'
    )
  else:
    result.append(
      f'  the state takes most ({estimate.state / 2**30:.1f} GiB): --mesh with fsdp, and --config.placement.inverses=owners'
    )
  return result


def _size(mesh: dict[str, int], *axes: str) -> int:
  return math.prod(mesh.get(a, 1) for a in axes)


class Search(NamedTuple):
  """The search for a mesh. planned: the forecast to show. best: the mesh that fits, if one was found.

  skipped: meshes that cannot be, with the reason.
  """

  planned: Forecast
  best: str | None
  skipped: dict[str, str]


def search(config: Any, devices: int, limit: int, images: bool) -> Search:
  """Finds the mesh of `devices` devices that communicates least among those whose programs fit into `limit` bytes.

  The forecast of the mesh that takes the least memory is the base, from which the memory of the others is scaled, so
  that only those that may fit are compiled. The search ends after four of these that do not fit.

  Raises:
    ConfigError: no mesh of so many devices can be.
  """
  options, skipped, base = candidates(config, devices, images), {}, None
  for mesh in reversed(options):
    base = _possible(config, mesh, skipped)
    if base is not None:
      break
  if base is None:
    last = next(reversed(skipped.items()), None)
    why = f'; of {len(skipped)} tried, {last[0]} fails because {last[1]}' if last else ''
    words = f'config.data.batch_size={config.data.batch_size} divides over no mesh of {devices} devices'
    raise ConfigError(f'{words} that this model can use; change it, or --devices{why}')
  tried = 0
  for mesh in options:
    if mesh in skipped or _guess(base, parallel.parse_mesh(mesh, devices)) > 1.1 * limit:
      continue
    candidate = base if parallel.parse_mesh(mesh, devices) == base.mesh else _possible(config, mesh, skipped)
    if candidate is None:
      continue
    if candidate.memory <= limit:
      return Search(candidate, mesh, skipped)
    tried += 1
    if tried == 4:
      break
  return Search(base, None, skipped)


def _possible(config: Any, mesh: str, skipped: dict[str, str]) -> Forecast | None:
  """Returns the forecast for a mesh, or None, with the reason in `skipped`, if the config cannot run on it."""
  try:
    return forecast(config, mesh)
  except (ConfigError, parallel.MeshError, parallel.PartitionError, kron.CurvatureError) as error:
    skipped[mesh] = str(error)
    return None


def _guess(base: Forecast, sizes: dict[str, int]) -> float:
  """Scales the memory of a device from one mesh to another."""
  axes = ('data', 'fsdp', 'space', 'columns')
  temporaries = max(p.temporaries + p.results for p in base.programs.values()) * _size(base.mesh, *axes)
  return temporaries / _size(sizes, *axes) + base.state * _size(base.mesh, 'fsdp') / _size(sizes, 'fsdp')


def candidates(config: Any, devices: int, images: bool) -> list[str]:
  """Returns meshes of `devices` devices, beginning with the one that communicates least.

  They divide the batch first, then parameters, then images. The sizes are powers of two, or what remains.
  """
  sentences = []
  powers = [2**k for k in range(devices.bit_length()) if devices % 2**k == 0]
  for space in powers if images else [1]:
    for fsdp in powers:
      data, rest = divmod(devices, fsdp * space)
      if rest or not data or config.data.batch_size % (data * fsdp) or fsdp > 64:
        continue
      sizes = {'data': data, 'fsdp': fsdp, 'space': space}
      sentences.append(','.join(f'{a}={n}' for a, n in sizes.items() if n > 1) or 'data=1')
  return sentences
