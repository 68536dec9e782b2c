"""The page that --help prints: how to call a command, its flags, and the few flags that all commands share."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterable

from absl import flags

HELP = ('--help', '-help', '-h', '-?')
_SHARED = ('config', 'workdir', 'debug')
_OTHERS = ('compilation_cache', 'coordinator_address', 'num_processes', 'process_id')
_WIDTH = 100
_SETTINGS = """--config.KEY=VALUE
    Changes one setting of the config, such as --config.steps=50 or --config.kfac.damping=0.01.
    `kronmesh configs NAME` lists the settings of a config with their values."""


def page(doc: str, values: flags.FlagValues = flags.FLAGS) -> str:
  """Returns the help of a command.

  doc: the docstring of the command's module, which has examples.
  """
  shared = [name for name in _SHARED if name in values]
  own = [name for name in _ours(values) if name not in (*_SHARED, *_OTHERS)]
  others = [name for name in _OTHERS if name in values]
  parts = [inspect.cleandoc(doc), *(_described(values[name]) for name in own)]
  parts += [_described(values[name]) for name in shared]
  parts += [_SETTINGS] if 'config' in shared else []
  parts += [f'Also --{", --".join(others)}.'] if others else []
  rest = len(list(values)) - len(own) - len(shared) - len(others)
  return '\n\n'.join([*parts, f'--helpfull lists these and {rest} flags of the libraries.'])


def _ours(values: flags.FlagValues) -> Iterable[str]:
  """Returns the names of the flags that our own modules define, in the order of their definition."""
  modules = values.flags_by_module_dict()
  ours = [module for module in modules if module.startswith('kronmesh.') or module == sys.argv[0]]
  return list(dict.fromkeys(flag.name for module in ours for flag in modules[module]))


def _described(flag: flags.Flag) -> str:
  boolean = flag.flag_type() == 'bool'
  default = flag.default_as_str.strip("'") if flag.default_as_str else ''
  head = f'--[no]{flag.name}' if boolean else f'--{flag.name}={default}' if default else f'--{flag.name}=...'
  return f'{head}\n{textwrap.indent(textwrap.fill(flag.help or "", _WIDTH - 4), "    ")}'
