"""Meshes, sharding rules, and the placement of an optimiser's state."""

from .audit import Audit, AuditError, Collective, assert_bytes, assert_no_gather, audit, written
from .mesh import BATCH, MeshError, batch_shards, make_mesh, parse_mesh
from .placement import Placement
from .rules import (
  RULES,
  Rules,
  batch_sharding,
  local_part,
  logical_axes,
  param_shardings,
  replicated,
  shard_blocks,
  state_shardings,
)
from .space import SplitError, Strip, split, strip

__all__ = [
  'BATCH',
  'RULES',
  'Audit',
  'AuditError',
  'Collective',
  'MeshError',
  'Placement',
  'Rules',
  'SplitError',
  'Strip',
  'assert_bytes',
  'assert_no_gather',
  'audit',
  'batch_sharding',
  'batch_shards',
  'local_part',
  'logical_axes',
  'make_mesh',
  'param_shardings',
  'parse_mesh',
  'replicated',
  'shard_blocks',
  'split',
  'state_shardings',
  'strip',
  'written',
]
