"""Meshes, sharding rules, and the placement of an optimiser's state."""

from .audit import Audit, AuditError, Collective, assert_bytes, assert_no_gather, audit, written
from .mesh import BATCH, STRIPS, MeshError, batch_shards, make_mesh, parse_mesh
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
from .space import PartitionError, Strip, partition, strip
from .strips import Strips, cut, image_sharding, image_strips, layer_strips, local_rows, padded_shape

__all__ = [
  'BATCH',
  'RULES',
  'STRIPS',
  'Audit',
  'AuditError',
  'Collective',
  'MeshError',
  'PartitionError',
  'Placement',
  'Rules',
  'Strip',
  'Strips',
  'assert_bytes',
  'assert_no_gather',
  'audit',
  'batch_sharding',
  'batch_shards',
  'cut',
  'image_sharding',
  'image_strips',
  'layer_strips',
  'local_part',
  'local_rows',
  'logical_axes',
  'make_mesh',
  'padded_shape',
  'param_shardings',
  'parse_mesh',
  'partition',
  'replicated',
  'shard_blocks',
  'state_shardings',
  'strip',
  'written',
]
