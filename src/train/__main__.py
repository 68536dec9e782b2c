"""`python -m kronmesh.train`."""

from .command import command

command()
