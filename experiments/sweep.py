"""Trains one config with several settings; the same as `kronmesh sweep`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('sweep', sys.argv[1:])
