"""Turns a trained ternary network into Verilog for a Lattice ECP5, proves it by simulation, and measures it.

  kronmesh synth --run=runs/ternary --part=ecp5-85k --out=logic

Images of the evaluation go through a simulation whose input and output are kept back at random, and every stream between
layers must be that of the reference. Yosys synthesises each layer, and nextpnr places and routes the whole; both are
packages of PyPI (pip install 'kronmesh[edge]'). The Verilog, the packed file and the numbers (synth.json) go to --out. What
was synthesised before is taken from ~/.cache/kronmesh/synthesis. Power, and the speed on a board, are not measured."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from .. import files
from ..edge import simulate, synthesise
from ..edge.verilog import STYLES
from ..tasks import synthesis
from ..train import jsonfile
from ..train.errors import ConfigError
from ..train.reporting.tables import columns
from ..train.runtime import launch

_RUN = flags.DEFINE_string('run', '', 'The work folder of a finished run of a ternary network.')
_PART = flags.DEFINE_string('part', 'ecp5-85k', f'The FPGA: {", ".join(synthesise.PARTS)}.')
_STYLE = flags.DEFINE_enum('style', 'serial', STYLES, 'How layers add up: bit by bit, or a pixel each cycle.')
_IMAGES = flags.DEFINE_integer('images', 20, 'How many images are simulated; 0: none.', 0)
_SIMULATOR = flags.DEFINE_enum(
  'simulator', 'iverilog', list(simulate.TOOLS), 'The simulator; verilator for many images.'
)
_PLACE = flags.DEFINE_bool('place', True, 'Whether to place and route, which takes minutes.')
_OUT = flags.DEFINE_string('out', 'logic', 'The folder for the results.')


def main() -> None:
  """Synthesises the network of --run and prints its layers."""
  if not _RUN.value:
    raise ConfigError('give --run: the work folder of a finished run of a ternary network')
  settings = (_PART.value, _STYLE.value, _IMAGES.value, _SIMULATOR.value, _PLACE.value)
  result = synthesis.flow(_RUN.value, Path(_OUT.value), *settings, tell=lambda words: print(words, flush=True))
  files.write(Path(_OUT.value) / 'synth.json', jsonfile.dumps(synthesis.numbers(result), indent=1) + '\n')
  print(f'\n{table(result)}')


def table(result: synthesis.Flow) -> str:
  """Returns what is printed."""
  heads = ('layer', 'weights', 'not zero', 'zeros', 'LUT4', 'a nonzero', 'registers', 'cycles')
  lines = []
  for row in result.rows:
    each = f'{row.cells.luts / row.nonzero:.2f}' if row.nonzero else '-'
    share = f'{1 - row.nonzero / row.weights:.1%}'
    cells = (f'{row.cells.luts:,}', each, f'{row.cells.registers:,}')
    lines.append((row.name, f'{row.weights:,}', f'{row.nonzero:,}', share, *cells, f'{row.cycles:,}'))
  total = sum(c.luts for c in result.cells.values())
  words = [
    columns(heads, lines),
    '',
    f'{total:,} LUT4s with queues, of {synthesise.part(_PART.value).luts:,} in {_PART.value}',
  ]
  if result.placed and result.speed:
    words.append(
      f'after routing {result.placed.luts:,} LUT4s and {result.placed.rams} block RAMs; {result.speed.megahertz:.1f} MHz, '
      f'{result.speed.cycles:,} cycles an image, {result.speed.images:,.0f} images/s'
    )
  words.append(f'{result.images} images were simulated with random stalls: all streams equal the reference')
  return '\n'.join([*words, *result.tools])


def command() -> None:
  """Synthesises the network that the command line names."""
  launch.command(main, 'kronmesh synth --run=runs/ternary --part=ecp5-85k')
