"""XLA's flags; imported before JAX loads."""

from __future__ import annotations

import os

# Without this XLA's CPU compiler drops what keeps rematerialised code apart, and merges it with what it is to replace.
KEEP_REMATERIALISED = '--xla_disable_hlo_passes=cse_barrier_expander'
QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'  # changes no allocation


def for_plans(quick: bool = True) -> None:
  """Has CPU programs take the memory that the same ones take elsewhere; quick: compiled to be looked at, not to be fast."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = (os.environ.get('XLA_FLAGS', ''), KEEP_REMATERIALISED, QUICK if quick else '')
  os.environ['XLA_FLAGS'] = ' '.join(' '.join(flags).split())
