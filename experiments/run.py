"""What a config becomes: state, programs, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.steps import TrainState
from experiments.task import Task
from kronmesh import kron, parallel


class Run(NamedTuple):
  """A config made real on a mesh.

  step: (state, batch, number) -> (state, metrics), by the programs below that the number asks for.
  programs: what is compiled: 'step' of (state, batch, statistics, refresh), the last two static; with an upkeep 'gradient'
    of (state, batch, statistics) and 'update' of (state, gradients) in its place.
  upkeep: of K-FAC's factors and inverses, between the two; None for other optimisers.
  evaluate: (state, batch) -> metrics.
  batch: shapes and shardings of a training batch, with the padding of its strips.
  strips: in which images lie, by axis.
  known_by: what tells its data from others, by name.
  curvatures: of the networks whose optimiser is of second order, by name; the only one of a run is called 'model'.
  draw: of a state, a picture (h, w, c) of what it makes; None where there is none.
  """

  config: Any
  task: Task
  mesh: Mesh
  curvatures: dict[str, kron.Curvature]
  placement: kron.Placement
  shardings: TrainState
  init: Callable[[int], TrainState]  # of the seed
  step: Callable
  programs: dict[str, Callable]
  upkeep: kron.Upkeep | None
  evaluate: Callable
  train_batches: Callable[[int, int], Iterator[dict[str, Any]]]  # of the seed and the first batch's number
  eval_batches: Callable[[], Iterator[dict[str, Any]]]
  batch: dict[str, jax.ShapeDtypeStruct]
  strips: parallel.Strips
  known_by: dict[str, Any]
  draw: Callable[[TrainState], np.ndarray] | None = None

  @property
  def curvature(self) -> kron.Curvature | None:
    """That of the only network, if it has one."""
    return self.curvatures.get('model')

  @property
  def coverage(self) -> str:
    """What K-FAC covers, as text; '' where nothing is of second order."""
    if self.curvature is not None:
      return str(self.curvature)
    return '\n\n'.join(f'{name}\n\n{own}' for name, own in self.curvatures.items())
