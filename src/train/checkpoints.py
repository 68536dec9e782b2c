"""Checkpoints of a run. They are logical, so that it resumes on another mesh, and each is whole or not there."""

from __future__ import annotations

import contextlib
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from .. import data, files, kron, parallel
from . import constants, jsonfile
from .errors import ConfigError, RunError, is_common
from .reporting.predictions import class_names
from .run import Run
from .runtime import durable, processes
from .runtime.workdir import as_json, changes
from .steps import TrainState

_TEXTS = ('metadata', '_METADATA', '_CHECKPOINT_METADATA', '_sharding', 'array_metadatas', '*.json', '.zarray')
_MOST_TEXT = 2**26  # bytes


class Restored(NamedTuple):
  """The state from which a run continues.

  position: the number of the next batch. unreadable: newer checkpoints that could not be read, and why.
  """

  state: TrainState
  position: int
  unreadable: dict[int, str]


@contextlib.contextmanager
def open_checkpoints(
  workdir: Path, keep: int | None = None, best: int = 0, lower_is_better: bool = True
) -> Iterator[ocp.CheckpointManager]:
  """Opens the run's checkpoints for reading or writing; saves finish before the context ends.

  They do not finish if one of several processes may have failed alone: a save finishes together with those of the other
  processes, which may be gone.

  Args:
    workdir: the run's folder.
    keep: the number of the newest checkpoints to keep; None for all.
    best: the number of checkpoints to keep beside them, those of the best evaluations.
    lower_is_better: whether smaller values of the task's metric are better.
  """
  _check_name(workdir)
  metric = (lambda metrics: metrics['target']) if best else None
  policies = [preservation_policy.LatestN(keep)]
  if best:
    policies.append(preservation_policy.BestN(get_metric_fn=metric, n=best, reverse=lower_is_better))
  checkpoints = ocp.CheckpointManager(
    (workdir / 'checkpoints').absolute(),
    options=ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
      best_fn=metric,
      create=True,
      temporary_path_class=durable.TemporaryFolder,
    ),
    item_handlers={'state': _handler(), 'run': ocp.JsonCheckpointHandler()},
  )
  try:
    yield checkpoints
  except BaseException as error:
    if not processes.several() or is_common(error):
      _close_after_error(checkpoints)
    raise
  checkpoints.close()


def _check_name(folder: Path) -> None:
  """Raises ConfigError for a path with \\, which the library that writes arrays would read as /."""
  if '\\' in str(folder.absolute()):
    raise ConfigError(f'{folder} has a backslash in its path, where arrays would be written elsewhere; choose another')


def _close_after_error(checkpoints: ocp.CheckpointManager) -> None:
  """Finishes the running save, and removes what an unfinished one has left, which may be what fills the disk."""
  with contextlib.suppress(Exception):  # report the error that led here instead; if a save failed, it is the same
    checkpoints.close()
  for unfinished in Path(checkpoints.directory).glob('*.orbax-checkpoint-tmp*') if processes.chief() else ():
    shutil.rmtree(unfinished, ignore_errors=True)


def _handler() -> ocp.PyTreeCheckpointHandler:
  # Replicas share only the writing of large arrays, because slicing each small one costs a compilation.
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _logical(run: Run, state: TrainState) -> TrainState:
  """Returns the state as a checkpoint holds it: factors by parameter, keys as numbers, and no graphs."""
  # Graphs are constants of a mesh.
  model_state = {name: values for name, values in state.model_state.items() if name != constants.COLLECTION}
  logical = kron.to_logical(state.opt_state)
  return state._replace(key=jax.random.key_data(state.key), model_state=model_state, opt_state=logical)


class Saver:
  """The background saver of checkpoints: by steps, by time, of the best evaluations, and whenever a run ends."""

  def __init__(self, run: Run, checkpoints: ocp.CheckpointManager):
    self.run, self.checkpoints, self.config = run, checkpoints, run.config
    self.workdir = Path(checkpoints.directory).parent
    self.saved = monotonic()
    self.logical = jax.jit(lambda s: _logical(run, s), out_shardings=parallel.replicated(run.mesh))

  def save_if_due(
    self, state: TrainState, step: int, position: int, scores: dict[str, float] | None, at_once: bool
  ) -> None:
    """Saves a checkpoint if one is due; an existing checkpoint of the same step stays.

    All processes must call it, after the same steps.

    Args:
      state: the state after the step.
      step: the step's number.
      position: the number of the next batch, which is the data iterator's whole state.
      scores: the scores of the evaluation, if there was one.
      at_once: whether the run ends here.
    """
    config = self.config
    if not config.keep_checkpoints:
      return
    sign = 1 if self.run.task.lower_is_better else -1
    metric = scores[self.run.task.target] if scores else math.nan
    metric = metric if math.isfinite(metric) else sign * math.inf  # no evaluation, or a non-finite one, ranks last
    minutes = (
      processes.agree(monotonic() - self.saved > 60 * config.checkpoint_minutes) if config.checkpoint_minutes else False
    )
    due = at_once or minutes or (config.checkpoint_every and step % config.checkpoint_every == 0)
    if (due or self._is_best(sign, metric)) and step not in self.checkpoints.all_steps():
      logical = self.logical(state)
      about = {'config': as_json(config), 'data': {'next_index': position}}
      about['x64'] = bool(jax.config.jax_enable_x64)
      about['values'] = [int(x) for x in jax.device_get(_fingerprints(logical))]
      about['check'] = _check(about)
      items = ocp.args.Composite(state=ocp.args.PyTreeSave(logical), run=ocp.args.JsonSave(about))
      durable.sync_rows(self.workdir)  # the checkpoint relies on these rows
      self.checkpoints.save(step, args=items, metrics={'target': metric})
      self.saved = monotonic()

  def _is_best(self, sign: int, metric: float) -> bool:
    if not self.config.keep_best:
      return False
    self.finish()  # the metric of a running save is not there yet
    known = [sign * metrics['target'] for s in self.checkpoints.all_steps() if (metrics := self.checkpoints.metrics(s))]
    return sign * metric < min(known, default=math.inf)

  def finish(self) -> None:
    """Waits for the running save."""
    self.checkpoints.wait_until_finished()


def restore(run: Run, checkpoints: ocp.CheckpointManager, new: Callable[[Run], TrainState]) -> Restored:
  """Reads the newest readable checkpoint onto this run's mesh, or makes a new state if there is none.

  Raises:
    ConfigError: the checkpoint is of another run.
    RunError: there are checkpoints, and none can be read.
  """
  unreadable: dict[int, str] = {}
  for step in sorted(checkpoints.all_steps(), reverse=True):
    restored, why = None, 'another process could not read it'
    try:
      restored = _restored(run, checkpoints, step)
    except ConfigError:
      raise
    except Exception as error:
      if processes.several() and processes.is_lost(error):
        raise
      why = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
    if not processes.any_of(restored is None):
      return restored._replace(unreadable=unreadable)
    unreadable[step] = why
  if unreadable:
    newest, why = next(iter(unreadable.items()))
    raise RunError(
      f'none of the checkpoints {", ".join(map(str, unreadable))} in {checkpoints.directory} can be read (of {newest}: '
      f'{why}); move them away to begin anew, or choose another --workdir'
    )
  return Restored(new(run), 0, {})


def _restored(run: Run, checkpoints: ocp.CheckpointManager, step: int) -> Restored:
  _check_texts(Path(checkpoints.directory) / str(step))
  about = checkpoints.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
  if about.pop('check') != _check(about):
    raise ValueError('what it says of its run is not what was written')
  wide = bool(jax.config.jax_enable_x64)
  if about.get('x64', wide) != wide:
    raise ConfigError(
      f'{checkpoints.directory / str(step)} was saved with JAX_ENABLE_X64={int(not wide)}; set that, or choose another '
      '--workdir'
    )
  changed = changes(about['config'], as_json(run.config))
  if changed:
    raise ConfigError(
      f'{checkpoints.directory / str(step)} is of a run with another {", ".join(changed)}; choose another --workdir'
    )
  state = _read(run, checkpoints, step, about['values'])
  if int(state.step) != step:
    raise ValueError(f'it is of step {int(state.step)}, and its folder is called {step}')
  return Restored(state, about['data']['next_index'], {})


@jax.jit
def _fingerprints(tree: Any) -> list[jax.Array]:
  """Returns a number for each leaf that changes with any of its bits, but not with the mesh.

  The number is a sum weighted by places, mod 2^32.
  """

  def one(x: jax.Array) -> jax.Array:
    size = x.dtype.itemsize
    bits = (
      x if not jnp.issubdtype(x.dtype, jnp.floating) else jax.lax.bitcast_convert_type(x, f'uint{8 * min(size, 4)}')
    )
    bits = bits.astype(jnp.uint32).reshape(-1)
    return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

  return [one(x) for x in jax.tree.leaves(tree)]


def _check(about: dict[str, Any]) -> int:
  return zlib.crc32(jsonfile.dumps(about, sort_keys=True).encode())


def _read(run: Run, checkpoints: ocp.CheckpointManager, step: int, values: list[int]) -> TrainState:
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(run.mesh)),
    jax.eval_shape(lambda: _logical(run, run.init(0))),
  )
  arguments = ocp.checkpoint_utils.construct_restore_args(like)
  restored = checkpoints.restore(
    step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(like, restore_args=arguments))
  ).state
  if [int(x) for x in jax.device_get(_fingerprints(restored))] != values:
    raise ValueError('its values are not those that were saved')
  like = jax.eval_shape(lambda: run.init(0)).opt_state

  def physical(state: TrainState) -> TrainState:
    graphs = {k: v for k, v in run.init(0).model_state.items() if k == constants.COLLECTION}
    return state._replace(
      key=jax.random.wrap_key_data(state.key),
      model_state={**state.model_state, **graphs},
      opt_state=kron.from_logical(state.opt_state, like),
    )

  return jax.jit(physical, out_shardings=run.shardings)(restored)


def set_aside(checkpoints: ocp.CheckpointManager, steps: Any) -> None:
  """Moves checkpoints that cannot be read out of the way of new ones."""
  aside = Path(checkpoints.directory).parent / 'unreadable'
  for step in steps if processes.chief() else ():
    aside.mkdir(exist_ok=True)
    number = next(n for n in range(10**6) if not (aside / f'{step}.{n}').exists())
    (Path(checkpoints.directory) / str(step)).rename(aside / f'{step}.{number}')
  processes.agree(True)  # no process goes on before this is done
  checkpoints.reload()


def export(run: Run, workdir: Path, state: TrainState, scores: dict[str, float]) -> None:
  """Writes what a model needs to be used, without the optimiser; `load_export` reads it."""
  params = state.average if run.config.recipe.average else state.params
  whole = jax.jit(lambda x: x, out_shardings=parallel.replicated(run.mesh))((params, state.model_state))
  about = {'config': as_json(run.config), 'step': int(state.step), 'scores': scores}
  about['example'] = list(run.batch['inputs'].shape[1:])
  about['names'] = list(class_names(run.config, run.config.model.get('classes', 0)))
  variables = {'params': whole[0], **whole[1]}
  about['values'] = _digests(jax.device_get(variables))
  with ocp.Checkpointer(_exported(_handler()), temporary_path_class=durable.TemporaryFolder) as writer:
    items = ocp.args.Composite(variables=ocp.args.PyTreeSave(variables), about=ocp.args.JsonSave(about))
    writer.save((workdir / 'export').absolute(), args=items, force=True)


def exported_step(workdir: Path) -> int | None:
  """Returns the step of a run's export, or None if there is no readable export."""
  with contextlib.suppress(Exception), ocp.Checkpointer(_exported(ocp.PyTreeCheckpointHandler())) as reader:
    _check_texts(workdir / 'export')
    items = ocp.args.Composite(about=ocp.args.JsonRestore())
    return int(reader.restore((workdir / 'export').absolute(), args=items)['about']['step'])
  return None


def load_export(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a run's export, which `train` writes when the run ends.

  Args:
    folder: the run's work folder, or the folder `export` in it.

  Returns:
    The variables for `model.apply`, as NumPy arrays, and a dict of 'config' (the run's), 'step' (the last), 'scores'
    (of the last evaluation), 'example' (the shape of an example) and 'names' (of the classes, where the data have them).

  Raises:
    ConfigError: there is no export, or it cannot be read.
    data.DataError: the export claims to be larger than memory.
  """
  folder = Path(folder).absolute()
  if (folder / 'export').is_dir():
    folder = folder / 'export'
  if not folder.is_dir() or (folder / 'config.json').exists():  # the latter is a run that has not ended
    raise ConfigError(f'no export in {folder}; a run writes it when it ends')
  odd = files.first_odd(folder)
  if odd is not None:
    raise ConfigError(f'{odd[0]} is {odd[1]}, and no part of an export; export the run again')
  _check_name(folder)
  _check_texts(folder)
  with ocp.Checkpointer(_exported(ocp.PyTreeCheckpointHandler())) as reader:
    try:
      shapes = reader.metadata(folder).item_metadata['variables'].tree
      needed = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(shapes))
    except Exception as error:
      raise ConfigError(f'{folder} cannot be read as an export: {" ".join(str(error).split())[:200]}') from error
    data.check_size(needed, sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()), f'the export in {folder}')
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    items = ocp.args.Composite(variables=ocp.args.PyTreeRestore(restore_args=arguments), about=ocp.args.JsonRestore())
    try:
      items_read = reader.restore(folder, args=items)
      values, known = _digests(items_read['variables']), items_read['about']['values']
    except Exception as error:
      raise ConfigError(f'{folder} cannot be read as an export: {" ".join(str(error).split())[:200]}') from error
  wrong = next((name for name in {**values, **known} if values.get(name) != known.get(name)), None)
  if wrong is not None:
    raise ConfigError(f'{folder}: the values of {wrong!r} are not those that were exported; export the run again')
  return items_read['variables'], items_read['about']


def _digests(variables: Any) -> dict[str, int]:
  """Returns a number for each array, by its path, that changes with any of its bits."""
  flat = jax.tree_util.tree_flatten_with_path(variables)[0]
  digest = lambda x: zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1))  # noqa: E731
  return {jax.tree_util.keystr(path, simple=True, separator='/'): digest(np.asarray(x)) for path, x in flat}


def _check_texts(folder: Path) -> None:
  """Raises ConfigError for a JSON description of arrays that is too large: it would be read into memory whole."""
  for name in _TEXTS:
    for path in folder.rglob(name):
      if path.stat().st_size > _MOST_TEXT:
        size = data.in_words(path.stat().st_size)
        raise ConfigError(
          f'{path} has {size}, more than such a file ever has; it is damaged, or made to fill the memory'
        )


def _exported(variables: ocp.PyTreeCheckpointHandler) -> ocp.CompositeCheckpointHandler:
  return ocp.CompositeCheckpointHandler(variables=variables, about=ocp.JsonCheckpointHandler())
