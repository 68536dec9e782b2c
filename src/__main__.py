"""`python -m kronmesh`, the same as the command `kronmesh`."""

from .commands.main import main

if __name__ == '__main__':
  main()
