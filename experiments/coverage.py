"""Lists the layers that K-FAC covers; the same as `kronmesh coverage`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('coverage', sys.argv[1:])
