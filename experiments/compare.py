"""Compares optimisers on one config; the same as `kronmesh compare`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('compare', sys.argv[1:])
