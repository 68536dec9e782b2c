"""JAX programs as lists of operations that can be read, changed and run again.

Both `kron` and `parallel` build on this package. It is the only one that touches JAX's tracing machinery.
"""

from .binding import at, bind, concrete, context, is_known, passes_gradient, vary, varying
from .kinds import CASTS, ENTRYWISE
from .marks import copies, copies_p, observe_p, used, used_p
from .ops import Op, Operand, Program, Ref, has_mark
from .program import jvp_program, trace
from .regions import (
  batch_axes,
  draws_from,
  manual_axes,
  manual_devices,
  observation_marks,
  rematerialise,
  scan_split,
  shard,
)
from .replay import visiting
from .replication import differing, reduced_behind, untracked
from .source import layer_name, source_line

__all__ = [
  'CASTS',
  'ENTRYWISE',
  'Op',
  'Operand',
  'Program',
  'Ref',
  'at',
  'batch_axes',
  'bind',
  'concrete',
  'context',
  'copies',
  'copies_p',
  'differing',
  'draws_from',
  'has_mark',
  'is_known',
  'jvp_program',
  'layer_name',
  'manual_axes',
  'manual_devices',
  'observation_marks',
  'observe_p',
  'passes_gradient',
  'reduced_behind',
  'rematerialise',
  'scan_split',
  'shard',
  'source_line',
  'trace',
  'untracked',
  'used',
  'used_p',
  'vary',
  'varying',
  'visiting',
]
