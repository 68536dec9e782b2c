"""Metrics of a run layer by layer: the health of its curvature, and the norms of its gradients and updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import kron, parallel
from .guard import norms
from .reporting.writers import Writers
from .run import Run
from .runtime.workdir import Rows
from .steps import TrainState


class Layers:
  """The writer of `layers.jsonl`: numbers by layer, every `config.health_every` steps and at the end."""

  def __init__(self, run: Run, workdir: Path, writers: Writers):
    self.run, self.writers, self.config = run, writers, run.config
    self.log = Rows(workdir / 'layers.jsonl', writers.log.chief)
    self.health = make_health(run)
    way = lambda params, before: norms(jax.tree.map(jnp.subtract, params, before))  # noqa: E731
    self.way = jax.jit(way, out_shardings=parallel.replicated(run.mesh))
    self.last, self.before = int(-1e9), None

  def due(self, step: int) -> bool:
    """Returns whether to write the layers of a step whose metrics have been fetched.

    The step is due if it is the first such step at or after the end of the interval, or the run's last.
    """
    every = self.config.health_every
    return bool(every) and (step // every > self.last // every or step == self.config.steps)

  def reset(self, step: int) -> None:
    """Discards what was kept, and the later rows, after a fault: the next update does not start from it."""
    self.before = None
    self.last = min(self.last, step)
    self.log.drop_after(step)

  def keep(self, state: TrainState) -> None:
    """Keeps the parameters before a step that is due; the difference afterwards is its update."""
    self.before = jax.tree.map(jnp.copy, state.params)

  def write(self, state: TrainState, row: dict[str, Any]) -> None:
    """Writes the numbers of a step by layer; all processes must call it."""
    self.last = row['step']
    layers = layer_rows(self.run, state, row, self.way(state.params, self.before), self.health)
    self.before = None
    self.log.add([{'step': row['step'], 'layers': layers}])
    self.writers.layers(row['step'], layers)


def make_health(run: Run) -> Callable[[TrainState], Any] | None:
  """Returns a function that computes the health of a state's factors and inverses, or None if it has none.

  The result stays on the devices until it is fetched.
  """
  if run.config.optimizer not in ('kfac', 'stale_kfac', 'adaptive_kfac') or run.curvature is None:
    return None
  settings = run.config[run.config.optimizer]

  @functools.partial(jax.jit, out_shardings=parallel.replicated(run.mesh))
  def health(state: TrainState) -> Any:
    damping = settings.damping
    if run.config.optimizer == 'adaptive_kfac':
      damping = kron.find_state(state.opt_state, kron.AdaptDampingState).damping
    return kron.health(state.opt_state, damping * state.guard.caution, run.placement)

  return health


def layer_rows(
  run: Run, state: TrainState, row: dict[str, Any], updates: jax.Array, health: Callable | None
) -> dict[str, dict[str, float]]:
  """Returns the numbers of a step by layer.

  Args:
    state: the state after the step.
    row: the step's metrics, with `gradient_norms`.
    updates: the norms of the parameters' updates.
    health: the function from `make_health`.

  Returns:
    For each parameter 'gradient_norm' and 'update_norm'. A parameter that leads a block of the curvature also has
    'damping_A', 'condition_A' and 'largest_A' (the worst of its matrices) for each factor, and 'refresh_interval' in
    steps.
  """
  names = kron.param_names(run.shardings.params)
  both = zip(names, row['gradient_norms'], jax.device_get(updates), strict=True)
  by_layer = {name: {'gradient_norm': float(g), 'update_norm': float(u)} for name, g, u in both}
  if health is None:
    return by_layer
  intervals = _intervals(run, state, int(row['step']))
  for block, factors in jax.device_get(health(state)).items():
    for factor, of_block in factors.items():
      numbers = {'damping': of_block.damping, 'condition': of_block.condition, 'largest': of_block.largest}
      by_layer[block] |= {f'{k}_{factor}': float(np.max(v)) for k, v in numbers.items()}
    by_layer[block]['refresh_interval'] = float(intervals[block])
  return by_layer


def _intervals(run: Run, state: TrainState, step: int) -> dict[str, float]:
  names = [b.name for b in run.curvature.blocks]
  if run.config.optimizer == 'stale_kfac':
    intervals = jax.device_get(kron.intervals(state.opt_state, run.curvature))
    return {name: min(int(x) for x in intervals[name].values()) for name in names}
  every = kron.growing(run.config[run.config.optimizer].inverses_every)(step)
  return dict.fromkeys(names, every)
