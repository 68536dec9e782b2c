"""The plan of a run: what a config would run, without running it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from ...data import in_words
from ..run import Run
from ..runtime.workdir import check_same


def plan(run: Run, workdir: Path) -> str:
  """Describes a run as text: devices, sizes, memory of the state, and what K-FAC covers.

  Traces the step's programs, and compiles nothing.

  Raises:
    ConfigError: the work folder holds another run.
  """
  config = run.config
  check_same(config, workdir)
  state = jax.eval_shape(lambda: run.init(0))
  flops = step_flops(run, state, run.batch)
  kinds = {d.device_kind for d in run.mesh.devices.flat}
  numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  here = _bytes(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), state, run.shardings))
  lines = [
    ('devices', f'{run.mesh.size} x {", ".join(sorted(kinds))} as {config.mesh}, {jax.process_count()} processes'),
    ('model', f'{config.model.name}, {numbers:,} parameters'),
    ('optimiser', f'{config.optimizer}'),
    ('data', f'{config.data.name}, {config.data.batch_size:,} examples a step, {config.steps:,} steps'),
    ('state', f'{in_words(_bytes(state))}, {in_words(here)} of it on each device'),
    ('a gradient', f'{flops / 1e9:,.3g} Gflop' if flops else 'flops unknown'),
    ('checkpoints', f'{config.keep_checkpoints} newest, {config.keep_best} best, in {workdir / "checkpoints"}'),
  ]
  text = '\n'.join(f'{name:12}{value}' for name, value in lines)
  return f'{text}\n\n{run.coverage}' if run.coverage else text


def step_flops(run: Run, state: Any, batch: Any) -> float:
  """Returns the flops of a step without statistics or refresh, on all devices together; 0 if XLA does not say."""
  name, extra = ('step', (False, False)) if run.inverse_schedule is None else ('gradient', (False,))
  cost = run.programs[name].lower(state, batch, *extra).cost_analysis() or {}
  return cost.get('flops', 0.0) * run.config.microbatches  # the loop over microbatches is counted once


def _bytes(tree: Any) -> int:
  def size(x: Any) -> int:
    x = jax.eval_shape(jax.random.key_data, x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return math.prod(x.shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))
