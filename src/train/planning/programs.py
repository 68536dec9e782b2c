"""The programs of a run, and what XLA reports about them: flops, bytes, memory, and compile time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..run import Run
from ..steps import TrainState

Programs = dict[str, tuple[Callable, tuple]]


def programs_of(run: Run, state: TrainState, batch: Any) -> Programs:
  """Returns the programs that a run compiles, with their arguments; the trees may hold shapes."""
  if run.inverse_schedule is not None:
    inverses = {f'inverses {name}': program for name, program in run.inverse_schedule.programs(state.opt_state).items()}
    return {
      'gradient': (run.programs['gradient'], (state, batch, False)),
      'gradient, statistics': (run.programs['gradient'], (state, batch, True)),
      'update': (run.programs['update'], (state, state.params)),
      **inverses,
    }
  step = run.programs['step']
  if run.curvature is None:
    return {'step': (step, (state, batch, False, False))}
  phases = {'step': (False, False), 'step, statistics': (True, False), 'step, refresh': (True, True)}
  return {name: (step, (state, batch, *at)) for name, at in phases.items()}


def held(tree: Any) -> int:
  """Returns the bytes that a tree takes on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  )


def abstract(run: Run) -> tuple[TrainState, Any]:
  """Returns the shapes and shardings of a run's state and batch."""
  like = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  state = jax.tree.map(like, jax.eval_shape(run.init, 0), run.shardings)
  return state, run.batch


def compile_all(programs: Programs, state: TrainState, batch: Any) -> dict[str, dict[str, float]]:
  """Compiles each program and returns what XLA reports.

  These are the seconds to trace and compile, flops and bytes as XLA counts them, and the bytes held while it runs.
  """
  lowered = {}
  for name, (fn, args) in programs.items():
    jax.clear_caches()
    start = time.perf_counter()
    program = fn.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis()
    # All that a run holds meanwhile, including gradients that another program made.
    resident = held(state) + held(batch) + (held(state.params) if name.startswith(('update', 'inverses')) else 0)
    grown = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    lowered[name] = {
      'seconds': seconds,
      'memory': resident + memory.temp_size_in_bytes + grown,
      'flops': cost.get('flops', 0.0),
      'bytes': cost.get('bytes accessed', 0.0),
    }
  return lowered
