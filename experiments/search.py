"""Tries settings of one config; the same as `kronmesh search`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('search', sys.argv[1:])
