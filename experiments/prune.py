"""Chooses which weights of a ternary network become zero; the same as `kronmesh prune`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('prune', sys.argv[1:])
