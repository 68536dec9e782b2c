"""Checkpoints of a run: logical, so that it resumes on another mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import orbax.checkpoint as ocp

from experiments import processes
from experiments.errors import RunError
from kronmesh import kron, parallel

if TYPE_CHECKING:
  from experiments.train import Run, TrainState


@contextmanager
def open_checkpoints(workdir: Path, keep: int | None = None) -> Iterator[ocp.CheckpointManager]:
  """The run's checkpoints, for reading or writing; saves end before it is left.

  Not where one of several processes may have failed alone: a save ends together with the others', who may be gone.
  """
  # Replicas share the writing of large arrays only: slicing each small one costs a compilation.
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  checkpoints = ocp.CheckpointManager(
    (workdir / 'checkpoints').absolute(),
    options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    item_handlers=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
  )
  try:
    yield checkpoints
  except BaseException as error:
    if not processes.several() or isinstance(error, RunError):  # which all processes raise together
      checkpoints.close()
    raise
  checkpoints.close()


def _logical(run: Run, state: TrainState) -> TrainState:
  """As a checkpoint holds it: factors by parameter, keys as numbers."""
  state = state._replace(key=jax.random.key_data(state.key))
  return (
    state
    if run.curvature is None
    else state._replace(opt_state=kron.to_logical(state.opt_state, run.curvature, run.placement))
  )


def save(run: Run, checkpoints: ocp.CheckpointManager, step: int, state: TrainState) -> None:
  """Saves in the background; a step that is there already stays."""
  if step not in checkpoints.all_steps():
    logical = jax.jit(lambda s: _logical(run, s), out_shardings=parallel.replicated(run.mesh))(state)
    checkpoints.save(step, args=ocp.args.PyTreeSave(logical))


def restore(run: Run, checkpoints: ocp.CheckpointManager) -> TrainState:
  """The newest checkpoint on this run's mesh, or a new state."""
  if checkpoints.latest_step() is None:
    return run.init(run.config.seed)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(run.mesh)),
    jax.eval_shape(lambda: _logical(run, run.init(0))),
  )
  found = checkpoints.restore(
    checkpoints.latest_step(),
    args=ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)),
  )

  like = jax.eval_shape(lambda: run.init(0)).opt_state

  def physical(found: TrainState) -> TrainState:
    found = found._replace(key=jax.random.wrap_key_data(found.key))
    if run.curvature is None:
      return found
    return found._replace(opt_state=kron.from_logical(found.opt_state, run.curvature, like, run.placement))

  return jax.jit(physical, out_shardings=run.shardings)(found)
