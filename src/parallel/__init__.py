"""Meshes, sharding rules, and the placement of an optimiser's state."""

from .mesh import MeshError, make_mesh, parse_mesh
from .placement import Placement
from .rules import RULES, batch_sharding, param_shardings, replicated, state_shardings

__all__ = [
  'RULES',
  'MeshError',
  'Placement',
  'batch_sharding',
  'make_mesh',
  'param_shardings',
  'parse_mesh',
  'replicated',
  'state_shardings',
]
