"""Trains one config; the same as `kronmesh train`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('train', sys.argv[1:])
