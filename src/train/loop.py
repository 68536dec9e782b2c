"""Training: from a config and a work folder to a trained model, starting at the newest checkpoint if there is one."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import files
from . import faults
from .beginning import new_state
from .build import build
from .checkpoints import Restored, Saver, export, exported_step, open_checkpoints, restore, set_aside
from .errors import ConfigError, Preempted, Stopped
from .layer_metrics import Layers
from .planning.plan import step_flops
from .reporting.about import write_about
from .reporting.live import LivePage, reported
from .reporting.meter import Meter
from .reporting.predictions import write_predictions
from .reporting.progress import Progress
from .reporting.usage import Usage
from .reporting.writers import Writers
from .run import Run
from .runtime import processes, starting
from .runtime.machine import peak
from .runtime.preemption import Preemption
from .runtime.profile import Profile
from .runtime.watchdog import Watchdog
from .runtime.workdir import (
  Events,
  Rows,
  as_json,
  check_config,
  check_data,
  claimed,
  evaluations,
  flat,
  read_rows,
  storage_errors,
)
from .steps import TrainState
from .task import first_at
from .watchers import Watchers


def train(
  config: Any, workdir: str | Path, quiet: bool = False, run: Run | None = None, profile: str | None = None
) -> list[dict[str, float]]:
  """Trains a config, from the newest checkpoint in the work folder if there is one.

  Writes `metrics.jsonl`, `events.jsonl`, `config.json`, `coverage.txt` (K-FAC), `checkpoints/` and, at the end,
  `export/`.

  Args:
    config: a config, such as `settings.defaults.defaults()` returns.
    workdir: the run's folder.
    quiet: whether to hide the progress.
    run: a run that was built before, from a config that differs at most in its seed; None builds one.
    profile: 'FIRST:LAST', the steps to trace; None for none.

  Returns:
    The rows of `metrics.jsonl` that carry an evaluation, including those before a resumption. Of several processes, only
    the first returns any.

  Raises:
    ConfigError: the config cannot be run.
    parallel.MeshError: the mesh, or the batch on it, does not fit the devices.
    data.DataError: the data are missing or cannot be used.
    kron.CurvatureError: K-FAC cannot treat the network or its loss.
    RunError: the run failed; it can be resumed.
    Preempted: the run was told to stop and has saved its state.
    Stopped: the run was told to stop, and keeps no checkpoints.
  """
  workdir = Path(workdir).absolute()
  tracing = Profile(profile, workdir / 'profile', config.steps)
  chief = processes.chief()  # writes the files that all processes share
  events = Events(workdir, chief, quiet)
  with contextlib.ExitStack() as stack:
    stack.enter_context(storage_errors(workdir))
    if processes.several():
      processes.require_alike('settings', identity(config, workdir))
    marks = workdir / '.processes' / processes.shared_name()
    watchdog = stack.enter_context(Watchdog(config.watchdog_seconds, marks))
    run = build(config) if run is None else run._replace(config=config)
    check = _claim(stack, run, workdir, events, marks) if chief else lambda: None
    processes.agree(True)  # the others wait until the folder exists
    _check_shared(workdir, marks)
    kept = config.keep_checkpoints or None, config.keep_best, run.task.lower_is_better
    checkpoints = stack.enter_context(open_checkpoints(workdir, *kept))
    restored = restore(run, checkpoints, new_state)
    start = int(restored.state.step)
    if restored.unreadable:
      set_aside(checkpoints, restored.unreadable)
    if not (start or restored.unreadable) and processes.agree(ended_without_checkpoints(run, workdir)):
      return evaluations(workdir) if chief else []
    _tell_beginning(restored, workdir, events, chief)
    before = evaluations(workdir)
    if start < config.steps and not processes.agree(arrived(run, before)):
      writers = stack.enter_context(Writers(config, workdir, start, chief, check))
      Loop(
        run, restored, Watchers(Saver(run, checkpoints), writers, events, tracing, watchdog, quiet or not chief)
      ).train()
    elif not processes.agree(exported_step(workdir) == start):  # killed between its last save and its export
      last = (before or [{}])[-1].items()
      scores = {k.removeprefix('eval_'): v for k, v in last if k.startswith('eval_')}
      export(run, workdir, restored.state, scores)
      write_predictions(run, restored.state, workdir)
  processes.agree(True)  # the others wait until the chief has finished
  return evaluations(workdir) if chief else []


def _claim(stack: contextlib.ExitStack, run: Run, workdir: Path, events: Events, marks: Path) -> Callable[[], None]:
  """Claims the work folder for this run, and records there what the run is.

  marks: the folder in which this run's processes leave marks; those of earlier runs are removed.

  Returns:
    A function that raises an error if the folder may no longer be written.
  """
  check = stack.enter_context(claimed(workdir, starting.patience())).check
  if processes.several():
    marks.mkdir(parents=True, exist_ok=True)
    (marks / 'shared').touch()
  check_config(run.config, workdir)
  check_data(run.known_by, workdir)
  write_about(run, workdir)
  stack.enter_context(reported(workdir, events, check))
  if run.coverage:
    files.write(workdir / 'coverage.txt', f'{run.coverage}\n')
  for old in (workdir / '.processes').glob('*'):
    if old != marks:
      shutil.rmtree(old, ignore_errors=True)
  return check


def _check_shared(workdir: Path, marks: Path) -> None:
  """Raises ConfigError unless all processes see the first one's work folder, in which it has left a mark."""
  if not processes.several():
    return
  mark, end = marks / 'shared', time.monotonic() + 10.0  # a network file system may take a moment
  while not mark.exists() and time.monotonic() < end:
    time.sleep(0.1)
    with contextlib.suppress(OSError):
      os.listdir(marks)
  if processes.any_of(not mark.exists()):
    where = 'does not see' if not mark.exists() else 'sees, but another process does not,'
    raise ConfigError(
      f'process {jax.process_index()} {where} the work folder {workdir} of process 0; it must lie on a disk that all share'
    )


def _tell_beginning(restored: Restored, workdir: Path, events: Events, chief: bool) -> None:
  """Reports where the run continues, and drops the rows of steps that will be taken again."""
  start = int(restored.state.step)
  for step, why in restored.unreadable.items():
    words = f'the checkpoint of step {step} cannot be read; it is in {workdir}/unreadable ({why})'
    events.add('warning', start, words)
  if start:
    events.add('resumed', start, f'from the checkpoint of step {start}')
  elif not restored.unreadable and read_rows(workdir / 'metrics.jsonl'):
    words = f'{workdir} has no checkpoint: rows of the steps before are dropped, and the run begins anew'
    events.add('warning', 0, words)
  for name, last in (('metrics', start), ('layers', start), ('events', math.inf)):  # also drops incomplete lines
    bad = Rows(workdir / f'{name}.jsonl', chief).drop_after(last)
    if bad:
      events.add('warning', start, f'{bad} lines of {name}.jsonl cannot be read, and are lost')


def identity(config: Any, workdir: Path) -> dict[str, Any]:
  """Returns what all processes of a run must have in common: settings, work folder, versions and the code itself."""
  code = hashlib.sha256()
  for path in sorted(Path(files.__file__).parent.rglob('*.py')):
    code.update(path.read_bytes())
  options = ('jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl', 'jax_threefry_partitionable')
  return {
    **{f'config.{key}': value for key, value in flat(as_json(config)).items()},
    **{name: getattr(jax.config, name) for name in options},
    **{name: version(name) for name in ('jax', 'jaxlib', 'flax', 'optax', 'kronmesh')},
    'workdir': str(workdir),
    'code': code.hexdigest()[:16],
  }


class Loop:
  """The loop over a run's steps, from the step at which it was restored.

  The host looks at the device only after some of the steps; nothing waits in between.

  position: the number of the next batch. It is that of the step, except for batches that were skipped after a fault.
  """

  def __init__(self, run: Run, restored: Restored, watchers: Watchers):
    self.run, self.config, self.watchers = run, run.config, watchers
    self.workdir = watchers.events.path.parent
    self.state, self.position = restored.state, restored.position
    self.step = int(self.state.step)
    self.batches = run.train_batches(self.config.seed, self.position)
    before = evaluations(self.workdir)
    self.trained, self.clock = before[-1]['seconds'] if before else 0.0, time.perf_counter()
    self.looks, self.policy = _looks(self.config), faults.Policy(self.config)
    self.meter = Meter(self.config.data.batch_size)
    self.usage = Usage(run.mesh.local_devices)
    self.page = LivePage(self.workdir, watchers.events.chief, watchers.writers.check)
    self.layers = Layers(run, self.workdir, watchers.writers)
    self.pending: list[tuple[int, dict[str, jax.Array]]] = []

  def train(self) -> None:
    """Takes all steps.

    Raises:
      Preempted: the run was told to stop and has saved its state.
      Stopped: the run was told to stop, and keeps no checkpoints.
      Diverged: a fault ended the run, by its policy.
    """
    config, size = self.config, self.config.data.batch_size
    title = f'{config.optimizer} on {config.data.name}, seed {config.seed}'
    with (
      Progress(title, config.steps, self.step, size, self.watchers.quiet) as bar,
      Preemption() as preemption,
      self.watchers.tracing,
    ):
      while self.step < config.steps:
        batch = self._take_step()
        looks = self.looks(self.step)
        stop = preemption.reached(looks)
        if not (stop or looks):
          continue
        forward = self._look(bar, batch)
        scores, reached = self._evaluate(bar) if forward and self._evaluates() else (None, False)
        if self._save(scores, stop, ends=reached or self.step == config.steps):
          return
        if self.page.due():
          with self.meter.of('checkpoint'):
            self.page.renew()
        self.clock = time.perf_counter()

  def _take_step(self) -> Any:
    """Takes a step without waiting for its result, and returns its batch."""
    self.watchers.tracing.before(self.step, self.state)
    with self.meter.of('input'):
      batch = next(self.batches)
    if self.looks(self.step + 1) and self.layers.due(self.step + 1):
      self.layers.keep(self.state)
    self.watchers.watchdog.beat(self.step)  # a process that waits for data does not get here
    self.state, metrics = self.run.step(self.state, batch, self.step)
    self.step, self.position = self.step + 1, self.position + 1
    self.pending.append((self.step, metrics))
    return batch

  def _look(self, bar: Progress, batch: Any) -> bool:
    """Waits for the steps since the last look and writes their metrics; returns whether the state went forward."""
    watchers, meter = self.watchers, self.meter
    rows = _fetched(self.pending)  # waits for the device once for all of them
    good = [row for row in rows if not row['held']]
    self.trained += time.perf_counter() - self.clock
    watchers.writers.steps(good)
    times = {**meter.row(self.step), **self.usage.row()}
    if good:
      watchers.events.look_at(good)
      watchers.events.count(good[-1])
      bar.update(good[-1]['step'], good[-1], times.get('examples_per_second'))
    if not meter.flops_share and not watchers.quiet:
      with self.usage.counted():
        flops = step_flops(self.run, self.state, batch)
        meter.flops_share = flops / peak(self.config.model.dtype, self.run.mesh.size)
    forward = True
    if len(good) < len(rows):
      forward = self._handle_fault(good, rows[len(good)], len(rows) - len(good))
    elif self.layers.before is not None:
      self.layers.write(self.state, rows[-1])
    watchers.writers.row('time', {**times, 'step': self.step})
    self.pending = []
    return forward

  def _handle_fault(self, good: list[dict[str, Any]], bad: dict[str, Any], held: int) -> bool:
    """Treats the first of `held` untaken steps by its policy; returns whether the state goes on from there."""
    watchers = self.watchers
    self.position -= held
    with watchers.watchdog.paused():
      self.state, forward = faults.handle(self.run, self.state, self.position, good, bad, self.policy, watchers)
    self.step, self.position = int(self.state.step), self.position + 1
    self.batches = self.run.train_batches(self.config.seed, self.position)
    self.layers.reset(self.step)
    return forward

  def _evaluates(self) -> bool:
    return self.step % self.config.eval_every == 0 or self.step == self.config.steps

  def _evaluate(self, bar: Progress) -> tuple[dict[str, float], bool]:
    """Returns the scores on the evaluation set, and whether the run ends here because it has reached its target."""
    run, writers = self.run, self.watchers.writers
    with self.meter.of('evaluation'), self.usage.apart():
      scores = evaluate_all(run, self.state, self.watchers.watchdog.beat)
    row = {'step': self.step, 'seconds': self.trained, **{f'eval_{k}': v for k, v in scores.items()}}
    writers.row('eval', row)
    bar.note(scores)
    if run.draw is not None:
      writers.picture(self.step, run.draw(self.state))
    return scores, arrived(run, [row])

  def _save(self, scores: dict[str, float] | None, stop: bool, ends: bool) -> bool:
    """Saves the checkpoint and the export if they are due; returns whether the run has ended."""
    saver, config = self.watchers.saver, self.config
    with self.meter.of('checkpoint'), self.usage.apart(), self.watchers.watchdog.paused():
      saver.save_if_due(self.state, self.step, self.position, scores, at_once=stop or ends)
      if ends or stop:
        saver.finish()
      if ends:
        export(self.run, self.workdir, self.state, scores)
        write_predictions(self.run, self.state, self.workdir)
    if ends:
      return True
    if stop and not config.keep_checkpoints:
      words = f'told to stop after step {self.step} of {config.steps}; config.keep_checkpoints=0 saves nothing'
      raise Stopped(words)
    if stop:
      raise Preempted(f'told to stop: saved step {self.step} of {config.steps}; the same command goes on from there')
    return False


def _looks(config: Any) -> Callable[[int], bool]:
  """Returns a function that says whether the host looks at the device after a step.

  The function does not use the config, which is slow to read.
  """
  every = [n for n in (config.log_every, config.eval_every, config.checkpoint_every) if n]
  steps = config.steps
  return lambda step: step == steps or any(step % n == 0 for n in every)


def _fetched(pending: list[tuple[int, dict[str, jax.Array]]]) -> list[dict[str, Any]]:
  """Fetches the metrics of steps as rows, which contain numbers, and vectors over the parameters."""
  for x in jax.tree.leaves(pending[-1][1]):
    x.copy_to_host_async()
  rows = []
  for step, metrics in pending:
    values = {name: np.asarray(x) for name, x in metrics.items()}
    rows.append({'step': step, **{k: v.item() if v.ndim == 0 else v for k, v in values.items()}})
  return rows


def evaluate_all(run: Run, state: TrainState, beat: Callable[[], None] = lambda: None) -> dict[str, float]:
  """Returns the scores of a state, from the means of its metrics over one pass of the evaluation set.

  beat: called before each batch.
  """
  parts = []
  for batch in run.eval_batches():
    beat()
    parts.append(run.evaluate(state, batch))
  parts = jax.device_get(parts)
  counts = [part.pop('examples') for part in parts]
  means = {name: float(np.average([part[name] for part in parts], weights=counts)) for name in parts[0]}
  return run.task.scores(means)


def ended_without_checkpoints(run: Run, workdir: Path) -> bool:
  """Returns whether the folder holds this run's end but no checkpoint, as they were removed or never kept.

  Raises:
    ConfigError: the folder holds the end of a shorter or longer run, whose results a new start would replace.
  """
  ended = exported_step(workdir)
  if ended is None:
    return False
  if ended != run.config.steps and not arrived(run, evaluations(workdir)):
    raise ConfigError(
      f'{workdir} holds the export of step {ended} and no checkpoint to go on from, and config.steps={run.config.steps} '
      'would begin anew and replace it; choose another --workdir'
    )
  return True


def arrived(run: Run, rows: list[dict[str, float]]) -> bool:
  """Returns whether the run stops at its target and has reached it."""
  return run.config.stop_at_target and first_at(run.config.target, run.task, rows) is not None
