"""Writes the page of a run; the same as `kronmesh report`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('report', sys.argv[1:])
