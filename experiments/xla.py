"""XLA's flags; imported before JAX loads."""

from __future__ import annotations

import os
from importlib.metadata import version

# Without this XLA's CPU compiler drops what keeps rematerialised code apart, and merges it with what it is to replace.
KEEP_REMATERIALISED = '--xla_disable_hlo_passes=cse_barrier_expander'
# Less work for the compiler; none of it changes an allocation.
QUICK = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1'
)
if version('jaxlib').startswith('0.10.'):  # later ones do not know it, and end
  QUICK += ' --xla_cpu_use_fusion_emitters=false'


def for_plans() -> None:
  """Has CPU programs take the memory that the same ones take elsewhere, and compiles them to be looked at."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = ' '.join(f'{os.environ.get("XLA_FLAGS", "")} {KEEP_REMATERIALISED} {QUICK}'.split())
