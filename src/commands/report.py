"""Writes the page of a run: curves, layers, events, devices, settings. It needs nothing but a browser.

  kronmesh report --workdir=runs/mine

A run writes its page when it ends, even if it fails. This command renews the page at any time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from ..train.errors import FAILED, MISTAKE, ConfigError
from ..train.reporting.report import write_report
from ..train.runtime.launch import parser_with_help

_WORKDIR = flags.DEFINE_string('workdir', 'runs/train', 'The folder of a run.')


def main(argv: list[str]) -> None:
  """Writes the page of the run in --workdir and prints its path."""
  try:
    if len(argv) > 1:
      raise ConfigError(f'{argv[1]!r} is not a flag; write --workdir=...')
    print(write_report(Path(_WORKDIR.value)))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(MISTAKE)
  except OSError as error:
    print(f'error: {_WORKDIR.value}: {error.strerror}', file=sys.stderr)
    sys.exit(FAILED)


def command() -> None:
  """Writes the page of the run that the command line names."""
  app.run(main, flags_parser=parser_with_help(main))
