"""The run that a config becomes: its state, programs and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from .. import kron, parallel
from .steps import TrainState
from .task import Task


class Run(NamedTuple):
  """A config that has been built on a mesh.

  step: (state, batch, number) -> (state, metrics). It runs the programs below that are due at this step number.
  programs: the compiled programs. Without an inverse schedule there is 'step' of (state, batch, statistics, refresh),
    the last two static. With one there are 'gradient' of (state, batch, statistics) and 'update' of (state, gradients)
    instead.
  inverse_schedule: renews K-FAC's factors in 'gradient' and its inverses before 'update'; None for other optimisers.
  evaluate: (state, batch) -> metrics.
  batch: the shapes and shardings of a training batch, including the padding of its strips.
  strips: the strips into which images are divided, by axis.
  known_by: the values that distinguish the run's data from other data, by name.
  curvatures: the curvature of each network that has a second-order optimiser, by name; a run's only network is 'model'.
  draw: (state) -> a picture (h, w, c) of what the run generates; None if it generates nothing.
  """

  config: Any
  task: Task
  mesh: Mesh
  curvatures: dict[str, kron.Curvature]
  placement: kron.Placement
  shardings: TrainState
  init: Callable[[int], TrainState]  # takes the seed
  step: Callable
  programs: dict[str, Callable]
  inverse_schedule: kron.InverseSchedule | None
  evaluate: Callable
  train_batches: Callable[[int, int], Iterator[dict[str, Any]]]  # takes the seed and the number of the first batch
  eval_batches: Callable[[], Iterator[dict[str, Any]]]
  batch: dict[str, jax.ShapeDtypeStruct]
  strips: parallel.Strips
  known_by: dict[str, Any]
  draw: Callable[[TrainState], np.ndarray] | None = None

  @property
  def curvature(self) -> kron.Curvature | None:
    """The curvature of the run's only network, or None."""
    return self.curvatures.get('model')

  @property
  def coverage(self) -> str:
    """A text about what K-FAC covers; '' if no optimiser is of second order."""
    if self.curvature is not None:
      return str(self.curvature)
    return '\n\n'.join(f'{name}\n\n{curvature}' for name, curvature in self.curvatures.items())
