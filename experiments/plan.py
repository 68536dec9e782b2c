"""Forecasts what a config needs; the same as `kronmesh plan`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('plan', sys.argv[1:])
