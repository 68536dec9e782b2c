"""Finds a subcommand of `kronmesh` by its name and runs it.

This module imports nothing slow, so that signals are answered before JAX loads.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from .. import __version__
from ..extras import MissingExtra

COMMANDS = {
  'train': 'train one config, or resume it',
  'compare': 'train a config with several optimisers and seeds, and print a table',
  'search': 'try the settings that a config proposes for each optimiser',
  'sweep': 'train a config with several settings, here or on Slurm',
  'plan': 'forecast memory, flops and traffic on devices that you do not have',
  'coverage': 'list the layers of a config that K-FAC covers, and how',
  'prune': 'choose which weights of a ternary network become zero',
  'pack': 'pack a ternary network into a small file, and check it',
  'synth': 'turn a ternary network into Verilog, and measure it',
  'report': 'write the page of a run anew',
  'configs': 'list the configs of the package, or the settings of one',
}


def main() -> None:
  """Runs the subcommand that the command line names."""
  name, *words = sys.argv[1:] or ['--help']
  if name in ('--help', '-h', '-help', 'help'):
    print(overview())
  elif name in ('--version', '-V'):
    print(f'kronmesh {__version__}')
  elif name in COMMANDS:
    run(name, words)
  else:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f'did you mean {near[0]!r}?' if near else f'choose from {", ".join(COMMANDS)}'
    print(f'error: kronmesh has no command {name!r}; {hint}', file=sys.stderr)
    sys.exit(2)


def run(name: str, words: list[str]) -> None:
  """Runs a subcommand with the words that follow its name."""
  try:
    from ..train.runtime import starting, terminal

    starting.answer_signals()
    terminal.keep_running_without()
    sys.argv = [f'kronmesh {name}', *words]
    importlib.import_module(f'.{name}', __package__).command()
  except MissingExtra as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def overview() -> str:
  """Returns the help of `kronmesh` itself."""
  width = max(map(len, COMMANDS))
  lines = [f'  {name:{width}}  {words}' for name, words in COMMANDS.items()]
  return '\n'.join([
    'Second-order optimisation and model parallelism for JAX.',
    '',
    'kronmesh COMMAND --config=NAME_OR_FILE --workdir=FOLDER',
    '',
    *lines,
    '',
    'kronmesh COMMAND --help tells more about one. A first run: kronmesh train --config=digits --workdir=runs/digits',
  ])  # fmt: skip
