"""A finished run's network as logic: written, simulated, synthesised, placed and routed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from ..edge import Network, pack, reference, report, simulate, synthesise
from ..edge.verilog import Design, design
from ..train.errors import RunError
from . import deployed


class Flow(NamedTuple):
  """The results of a flow. rows: by layer. placed, speed: None where only synthesis was asked for.

  images: how many were simulated, all equal on all streams. tools: what was used, in words.
  """

  network: Network
  design: Design
  rows: list[report.Row]
  cells: dict[str, synthesise.Cells]
  placed: synthesise.Placed | None
  speed: report.Speed | None
  images: int
  tools: list[str]


def flow(
  run: str | Path,
  out: Path,
  part: str,
  style: str,
  images: int,
  simulator: str,
  place: bool = True,
  tell: Callable[[str], None] = lambda words: None,
) -> Flow:
  """Takes a finished run's network through the whole flow, and writes its Verilog and packed file to `out`.

  The tools and the part are checked first, so that a mistake is told before anything is written.

  Args:
    style: of all layers, 'serial' or 'parallel'.
    images: how many of the evaluation are simulated, with random stalls.
    simulator: 'iverilog' or 'verilator'.
    tell: is told what is done next.

  Raises:
    ConfigError: as `deployed.deploy`.
    EdgeError: a tool is missing or refuses the design, or the part is unknown or too small.
    RunError: a stream of the simulation differs from the reference.
  """
  synthesise.part(part)
  tools = [f'Yosys: {synthesise.version("yosys")}']
  if images:
    simulate.need(simulator)
    tools.append(simulator)
  if place:
    tools.append(f'nextpnr: {synthesise.version("nextpnr-ecp5")}')
  found = deployed.deploy(run)
  made = design(found.network, style)
  if images:
    tell(f'simulating {images} images by {simulator}')
    simulated(found, made, images, simulator)
  tell('synthesising')
  netlists = synthesise.synthesise(made)
  cells = {name: synthesise.cells(netlist) for name, netlist in netlists.items()}
  synthesise.check_size(cells, part)
  placed = speed = None
  if place:
    tell('placing and routing')
    placed = synthesise.place(netlists, part)
    speed = report.speed(found.network, made, placed)
  (out / 'verilog').mkdir(parents=True, exist_ok=True)
  for name, text in made.files.items():
    files.write(out / 'verilog' / name, text)
  pack.save(found.network, out / 'network.kmt')
  rows = report.rows(found.network, made, cells)
  return Flow(found.network, made, rows, cells, placed, speed, images, tools)


def simulated(found: deployed.Deployed, made: Design, images: int, simulator: str) -> None:
  """Compares every stream of a simulation with the reference.

  Raises:
    RunError: one differs.
  """
  inputs, _ = deployed.evaluation(found.config, images)
  levels = reference.quantised(inputs, found.network.plan.bits)
  result = simulate.simulate(made, levels, simulator, stalls=6)
  wrong = simulate.differences(found.network, result, levels)
  if wrong:
    stream, values = wrong[0]
    raise RunError(f'stream {stream} of the simulation differs from the reference in {values} values')


def numbers(result: Flow) -> dict[str, Any]:
  """Returns the results as JSON holds them."""
  return {
    'layers': [{**row._asdict(), 'cells': row.cells and row.cells._asdict()} for row in result.rows],
    'cells': {name: cells._asdict() for name, cells in result.cells.items()},
    'placed': result.placed and result.placed._asdict(),
    'speed': result.speed and result.speed._asdict(),
    'simulated images': result.images,
    'tools': result.tools,
  }
