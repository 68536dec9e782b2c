"""Flags of XLA. Import this module before JAX loads."""

from __future__ import annotations

import os
from importlib.metadata import version

# Without this flag, XLA's CPU compiler drops the barriers around rematerialised code and merges it with the original.
KEEP_REMATERIALISED = '--xla_disable_hlo_passes=cse_barrier_expander'
# These flags save the compiler work and change no allocation.
QUICK = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1'
)
if version('jaxlib').startswith('0.10.'):  # later releases exit on this unknown flag
  QUICK += ' --xla_cpu_use_fusion_emitters=false'


def for_plans() -> None:
  """Sets XLA to compile CPU programs quickly, for inspection, with the memory that they would take elsewhere."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = ' '.join(f'{os.environ.get("XLA_FLAGS", "")} {KEEP_REMATERIALISED} {QUICK}'.split())
