"""Synthesis by Yosys, and placing and routing by nextpnr, for Lattice ECP5: LUTs of each layer and the clock's frequency.

Each layer is synthesised by itself, and the results are kept by what they were made from. nextpnr gets all together.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from .errors import EdgeError
from .verilog.top import Design

SPEED = 6  # the slowest grade
PACKAGE = 'CABGA381'  # all sizes come in it
ANSWER = 'pip install kronmesh[edge], or Debian packages yosys and nextpnr-ecp5'


class Part(NamedTuple):
  """A size of the ECP5: nextpnr's flag for it, its LUT4s, and its block RAMs of 18 kbit."""

  flag: str
  luts: int
  rams: int


PARTS = {
  'ecp5-12k': Part('12k', 12_144, 32),
  'ecp5-25k': Part('25k', 24_288, 56),
  'ecp5-45k': Part('45k', 43_848, 108),
  'ecp5-85k': Part('85k', 83_640, 208),
}


class Cells(NamedTuple):
  """What a module takes. luts: LUT4s, two for each pair of carry cells and four for 16 x 4 bits of memory."""

  luts: int
  registers: int
  rams: int


class Placed(NamedTuple):
  """nextpnr's result. megahertz: the clock after routing. luts, registers, rams: as it counts them."""

  megahertz: float
  luts: int
  registers: int
  rams: int


def tool(name: str) -> str:
  """Returns the command of 'yosys' or 'nextpnr-ecp5': that of the PyPI packages if they are installed, else of the path.

  Raises:
    EdgeError: there is none.
  """
  beside = Path(sys.executable).parent / f'yowasp-{name}'
  path = str(beside) if beside.exists() else shutil.which(f'yowasp-{name}') or shutil.which(name)
  if path is None:
    raise EdgeError(f'{name} is not installed; {ANSWER}')
  return path


def version(name: str) -> str:
  """Returns what a tool says of its version, in one line."""
  done = subprocess.run([tool(name), '--version'], capture_output=True, text=True, check=False)
  return (done.stdout + done.stderr).strip().splitlines()[-1]


def part(name: str) -> Part:
  """Returns a part by name.

  Raises:
    EdgeError: it is unknown.
  """
  if name not in PARTS:
    raise EdgeError(f'the part {name!r} is unknown; choose from {", ".join(PARTS)}')
  return PARTS[name]


def synthesise(design: Design, cache: str | Path | None = None) -> dict[str, Any]:
  """Synthesises each layer, and the rest around them, and returns the netlists by module.

  cache: the folder where netlists are kept; ~/.cache/kronmesh/synthesis otherwise.

  Raises:
    EdgeError: Yosys is missing, or it does not accept a module.
  """
  command, said = tool('yosys'), version('yosys')
  cache = Path(cache or Path.home() / '.cache' / 'kronmesh' / 'synthesis')
  jobs = {name: _script(design, name) for name in (*layer_names(design), 'board')}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    made = {name: pool.submit(_netlist, command, said, design, script, name, cache) for name, script in jobs.items()}
    return {name: future.result() for name, future in made.items()}


def layer_names(design: Design) -> list[str]:
  """Returns the modules of a design's layers, in order."""
  return [f'layer_{i}' for i in range(len(design.styles) - 1)] + ['head']


def _script(design: Design, name: str) -> str:
  if name != 'board':
    return f'read_verilog -sv *.v; synth_ecp5 -top {name} -json out.json'
  whole = ' '.join(f'{layer}.v' for layer in layer_names(design))
  rest = ' '.join(f for f in design.files if f.removesuffix('.v') not in layer_names(design))
  widths = f'-set IN {design.streams[0].bus} -set OUT {design.streams[-1].bus}'
  read = f'read_verilog -sv -lib {whole}; read_verilog -sv {rest}; chparam {widths} board'
  return f'{read}; synth_ecp5 -top board -json out.json'


def _sources(design: Design, name: str) -> dict[str, str]:
  """Returns the files that a module needs."""
  library = {f: t for f, t in design.files.items() if not f.startswith(('layer_', 'head', 'network', 'board'))}
  if name == 'board':
    return dict(design.files)
  return library | {f: design.files[f] for f in (f'{name}.v', f'{name}_sums.v')}


def _netlist(command: str, said: str, design: Design, script: str, name: str, cache: Path) -> dict[str, Any]:
  sources = _sources(design, name)
  key = hashlib.sha256(json.dumps([said, script, sources], sort_keys=True).encode()).hexdigest()[:32]
  kept = cache / f'{key}.json'
  if kept.exists():
    return json.loads(kept.read_bytes())
  with tempfile.TemporaryDirectory() as folder:
    for file, text in sources.items():
      (Path(folder) / file).write_text(text)
    done = _ran([command, '-q', '-p', script.replace('*.v', ' '.join(sources))], folder)
    out = Path(folder) / 'out.json'
    if done.returncode or not out.exists():
      lines = [line for line in (done.stdout + done.stderr).splitlines() if 'ERROR' in line]
      raise EdgeError(f'{name}: Yosys ends with {lines[0] if lines else f"code {done.returncode}"}')
    modules = json.loads(out.read_bytes())['modules']
  used = {n: m for n, m in modules.items() if n == name or not m['attributes'].get('blackbox')}
  netlist = {n: {k: m[k] for k in ('attributes', 'ports', 'cells', 'netnames')} for n, m in used.items()}
  cache.mkdir(parents=True, exist_ok=True)
  files.write(kept, json.dumps(netlist, separators=(',', ':')))
  return netlist


def _ran(command: list[str], folder: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def cells(netlist: Mapping[str, Any]) -> Cells:
  """Counts the cells of a module's netlist."""
  counts = Counter(cell['type'] for module in netlist.values() for cell in module['cells'].values())
  luts = counts['LUT4'] + 2 * counts['CCU2C'] + 4 * counts['TRELLIS_DPR16X4']
  return Cells(luts, counts['TRELLIS_FF'], counts['DP16KD'])


def check_size(counted: Mapping[str, Cells], part_name: str) -> None:
  """Raises EdgeError for a part that is too small, which names the largest layer."""
  size = part(part_name)
  luts, rams = (sum(c[k] for c in counted.values()) for k in (0, 2))
  if luts <= size.luts and rams <= size.rams:
    return
  layers = {n: c for n, c in counted.items() if n != 'board'}
  most = max(layers, key=lambda n: layers[n].luts)
  larger = [n for n, p in PARTS.items() if p.luts >= luts and p.rams >= rams]
  answer = f'take --part={larger[0]}' if larger else 'make it sparser, narrower or of fewer bits, or fold it'
  raise EdgeError(
    f'{part_name} has {size.luts:,} LUT4s and {size.rams} block RAMs, and the network needs {luts:,} and {rams}; {most} '
    f'alone has {layers[most].luts:,}: {answer}'
  )


def place(
  netlists: Mapping[str, Mapping[str, Any]], part_name: str, seed: int = 1, cache: str | Path | None = None
) -> Placed:
  """Places and routes a synthesised design.

  Raises:
    EdgeError: nextpnr is missing, or it does not find places for all cells.
  """
  command, said, size = tool('nextpnr-ecp5'), version('nextpnr-ecp5'), part(part_name)
  modules = {n: m for netlist in netlists.values() for n, m in netlist.items()}
  modules = {n: _as_top(m, n == 'board') for n, m in modules.items()}
  text = json.dumps({'modules': modules}, separators=(',', ':'))
  flags = [f'--{size.flag}', '--package', PACKAGE, '--speed', str(SPEED), '--seed', str(seed), '--freq', '150']
  flags += ['--timing-allow-fail', '--lpf-allow-unconstrained']
  key = hashlib.sha256(json.dumps([said, flags, text]).encode()).hexdigest()[:32]
  kept = Path(cache or Path.home() / '.cache' / 'kronmesh' / 'synthesis') / f'{key}.placed'
  if kept.exists():
    return Placed(**json.loads(kept.read_bytes()))
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / 'net.json').write_text(text)
    done = _ran([command, *flags, '--json', 'net.json'], folder)
  said = done.stdout + done.stderr
  clocks = re.findall(r'Max frequency for clock .*?: ([\d.]+) MHz', said)
  if done.returncode or not clocks:
    lines = [line for line in said.splitlines() if 'ERROR' in line]
    raise EdgeError(f'nextpnr ends with {lines[0] if lines else f"code {done.returncode}"}')
  used = {k: int(n) for k, n in re.findall(r'(\w+):\s+(\d+)/\s*\d+\s+\d+%', said)}
  placed = Placed(float(clocks[-1]), used['TRELLIS_COMB'], used['TRELLIS_FF'], used['DP16KD'])
  kept.parent.mkdir(parents=True, exist_ok=True)
  files.write(kept, json.dumps(placed._asdict()))
  return placed


def _as_top(module: Mapping[str, Any], top: bool) -> dict[str, Any]:
  """Marks the one module that is the top; each was the top of its own synthesis."""
  attributes = {k: v for k, v in module['attributes'].items() if k != 'top'}
  return {**module, 'attributes': attributes | ({'top': f'{1:032b}'} if top else {})}
