"""Packs a ternary network into a small file; the same as `kronmesh pack`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('pack', sys.argv[1:])
