"""Turns a ternary network into Verilog and measures it; the same as `kronmesh synth`."""

import sys

from kronmesh.commands.main import run

if __name__ == '__main__':
  run('synth', sys.argv[1:])
