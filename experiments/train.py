"""Trains one config: mesh, data, model, state, step, loop.

python experiments/train.py --config=experiments/configs/digits.py --config.optimizer=adam --workdir=runs/adam

Without --config it trains digits.py. A second call in the same folder goes on from the last checkpoint. --dry_run checks,
plans and ends; --profile=10:15 traces these steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
import numpy as np
from absl import flags

from experiments import faults, folder, processes, starting
from experiments.build import Run, build
from experiments.checkpoints import Saver, export, exported_step, open_checkpoints, restore, set_aside
from experiments.errors import ConfigError, Preempted, Stopped, StorageError
from experiments.layers import Layers
from experiments.machine import peak
from experiments.meter import Meter
from experiments.optimizers import SECOND_ORDER
from experiments.plan import plan, step_flops
from experiments.preemption import Preemption
from experiments.profile import Profile
from experiments.progress import Progress
from experiments.report import write_report
from experiments.steps import TrainState
from experiments.task import first_at
from experiments.watchdog import Watchdog
from experiments.writers import Writers
from kronmesh import files

_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check the config, print what would run, and end. Nothing is written.')
_PROFILE = flags.DEFINE_string('profile', None, 'FIRST:LAST, the steps that are traced into the folder `profile`.')


def train(
  config: Any, workdir: str | Path, quiet: bool = False, run: Run | None = None, profile: str | None = None
) -> list[dict[str, float]]:
  """Trains, from the newest checkpoint in the work folder if there is one.

  Writes `metrics.jsonl`, `events.jsonl`, `config.json`, `coverage.txt` (K-FAC), `checkpoints/` and, at the end, `export/`.

  Args:
    config: see experiments/configs/defaults.py.
    workdir: the run's folder.
    quiet: no progress.
    run: one built before from a config that differs in its seed at most.
    profile: 'FIRST:LAST', steps to trace.

  Returns:
    The rows of `metrics.jsonl` that carry an evaluation, those before a resumption included.

  Raises:
    ConfigError, parallel.MeshError, data.DataError, kron.CurvatureError: a config that cannot be run.
    RunError: the run failed; it can be resumed.
    Preempted: it was told to stop, and has saved.
  """
  workdir = Path(workdir).absolute()
  tracing = Profile(profile, workdir / 'profile', config.steps)
  chief = processes.chief()  # writes what all share
  events = folder.Events(workdir, chief, quiet)
  check = lambda: None  # noqa: E731
  with contextlib.ExitStack() as stack:
    stack.enter_context(folder.storage_errors(workdir))
    if processes.several():
      processes.require_alike('settings', identity(config, workdir))
    marks = workdir / '.processes' / processes.shared_name()
    watchdog = stack.enter_context(Watchdog(config.watchdog_seconds, marks))
    run = build(config) if run is None else run._replace(config=config)
    if chief:
      check = stack.enter_context(folder.claimed(workdir, starting.patience())).check
      folder.check_config(config, workdir)
      folder.check_data(run.known_by, workdir)
      folder.write_about(run, workdir)
      stack.enter_context(_reported(workdir, events, check))
      if run.coverage:
        files.write(workdir / 'coverage.txt', f'{run.coverage}\n')
      for old in (workdir / '.processes').glob('*'):
        if old != marks:
          shutil.rmtree(old, ignore_errors=True)
    processes.agree(True)  # that the folder is there
    kept = config.keep_checkpoints or None, config.keep_best, run.task.lower_is_better
    checkpoints = stack.enter_context(open_checkpoints(workdir, *kept))
    restored = restore(run, checkpoints)
    start = int(restored.state.step)
    if restored.unreadable:
      set_aside(checkpoints, restored.unreadable)
      for step, why in restored.unreadable.items():
        events.add(
          'warning', start, f'the checkpoint of step {step} cannot be read; it is in {workdir}/unreadable ({why})'
        )
    if start:
      events.add('resumed', start, f'from the checkpoint of step {start}')
    elif not restored.unreadable and processes.agree(ended_without_checkpoints(run, workdir)):
      return folder.evaluations(workdir) if chief else []
    elif folder.read_rows(workdir / 'metrics.jsonl'):
      events.add(
        'warning', 0, f'{workdir} has no checkpoint: rows of the steps before are dropped, and the run begins anew'
      )
    for name, last in (('metrics', start), ('layers', start), ('events', math.inf)):  # and lines that are not whole
      bad = folder.Rows(workdir / f'{name}.jsonl', chief).drop_after(last)
      if bad:
        events.add('warning', start, f'{bad} lines of {name}.jsonl cannot be read, and are lost')
    before = folder.evaluations(workdir)
    if start < config.steps and not processes.agree(arrived(run, before)):
      writers = stack.enter_context(Writers(config, workdir, start, chief, check))
      saver, quiet = Saver(run, checkpoints), quiet or not chief
      _loop(run, restored.state, restored.position, saver, writers, events, tracing, watchdog, quiet)
    elif not processes.agree(exported_step(workdir) == start):  # killed between its last save and that
      last = (before or [{}])[-1].items()
      scores = {k.removeprefix('eval_'): v for k, v in last if k.startswith('eval_')}
      export(run, workdir, restored.state, scores)
  processes.agree(True)  # the others wait for what the chief has to finish
  return folder.evaluations(workdir) if chief else []


@contextlib.contextmanager
def _reported(workdir: Path, events: folder.Events, check: Callable[[], None]) -> Iterator[None]:
  """Writes the report at the end, whatever that is, and how the run ended if not well.

  check: raises an error where the folder may not be written any more.
  """
  well = True
  try:
    yield
  except Exception as error:
    well = False
    with contextlib.suppress(OSError, StorageError):  # on a full disk
      check()
      rows = folder.read_rows(workdir / 'metrics.jsonl')
      kind = 'stopped' if isinstance(error, Preempted) else 'error'
      events.add(kind, rows[-1]['step'] if rows else 0, f'{type(error).__name__}: {error}', tell=False)
    raise
  finally:
    with contextlib.suppress(StorageError):
      check()
      try:
        write_report(workdir)
      except Exception as error:  # a page is no reason to lose a run
        told = f'report.html cannot be made: {" ".join(str(error).split())[:200]}'
        with contextlib.suppress(OSError):
          events.add('warning', 0, told, tell=well)  # else what ended the run has been told


def identity(config: Any, workdir: Path) -> dict[str, Any]:
  """Returns what all processes of a run must have alike: settings, where they write, versions and the code itself."""
  code = hashlib.sha256()
  for root in (Path(__file__).parent, Path(files.__file__).parent):
    for path in sorted(root.rglob('*.py')):
      code.update(path.read_bytes())
  options = ('jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl', 'jax_threefry_partitionable')
  return {
    **{f'config.{key}': value for key, value in folder.flat(folder.as_json(config)).items()},
    **{name: getattr(jax.config, name) for name in options},
    **{name: version(name) for name in ('jax', 'jaxlib', 'flax', 'optax', 'kronmesh')},
    'workdir': str(workdir),
    'code': code.hexdigest()[:16],
  }


def _loop(
  run: Run,
  state: TrainState,
  position: int,
  saver: Saver,
  writers: Writers,
  events: folder.Events,
  tracing: Profile,
  watchdog: Watchdog,
  quiet: bool,
) -> None:
  """`position`: the number of the next batch, which is the step's but for batches left out after a fault."""
  config, workdir = run.config, events.path.parent
  step, batches = int(state.step), run.train_batches(config.seed, position)
  before = folder.evaluations(workdir)
  trained, clock = before[-1]['seconds'] if before else 0.0, time.perf_counter()
  looks, steps = _looks(config), config.steps
  policy, pending, meter, layers = (
    faults.Policy(config),
    [],
    Meter(config.data.batch_size),
    Layers(run, workdir, writers),
  )
  with (
    Progress(f'{config.optimizer} on {config.data.name}', config.steps, step, config.data.batch_size, quiet) as bar,
    Preemption() as preemption,
    tracing,
  ):
    while step < steps:
      tracing.before(step, state)
      with meter.of('input'):
        batch = next(batches)
      if looks(step + 1) and layers.due(step + 1):
        layers.keep(state)
      watchdog.beat(step)  # a process that waits for data has not come to this
      state, metrics = run.step(state, batch, step)
      step, position = step + 1, position + 1
      pending.append((step, metrics))
      stop = preemption.reached(looks(step))
      if not (stop or looks(step)):
        continue
      rows = _fetched(pending)  # one wait for the device for all the steps since the last
      good = [row for row in rows if not row['held']]
      trained += time.perf_counter() - clock
      writers.steps(good)
      times = meter.row(step)
      if good:
        events.look_at(good)
        events.count(good[-1])
        bar.update(good[-1]['step'], good[-1], times.get('examples_per_second'))
      if not meter.flops_share and not quiet:
        meter.flops_share = step_flops(run, state, batch) / peak(config.model.dtype, run.mesh.size)
      forward = True
      if len(good) < len(rows):
        position -= len(rows) - len(good)
        with watchdog.paused():
          bad = rows[len(good)]
          state, forward = faults.handle(run, state, position, good, bad, policy, saver, events, writers.log)
        step, position = int(state.step), position + 1
        batches = run.train_batches(config.seed, position)
        layers.reset(step)
      elif layers.before is not None:
        layers.write(state, rows[-1])
      writers.row('time', {**times, 'step': step})
      pending, scores, reached = [], None, False
      if forward and (step % config.eval_every == 0 or step == config.steps):
        with meter.of('evaluation'):
          scores = evaluate_all(run, state, watchdog.beat)
        row = {'step': step, 'seconds': trained, **{f'eval_{k}': v for k, v in scores.items()}}
        writers.row('eval', row)
        bar.note(scores)
        if run.draw is not None:
          writers.picture(step, run.draw(state))
        reached = arrived(run, [row])
      ends = reached or step == config.steps
      with meter.of('checkpoint'), watchdog.paused():
        saver.save_if_due(state, step, position, scores, at_once=stop or ends)
        if ends or stop:
          saver.finish()
        if ends:
          export(run, workdir, state, scores)
      if ends:
        return
      if stop and not config.keep_checkpoints:
        raise Stopped(f'told to stop after step {step} of {config.steps}; config.keep_checkpoints=0 saves nothing')
      if stop:
        raise Preempted(f'told to stop: saved step {step} of {config.steps}; the same command goes on from there')
      clock = time.perf_counter()


def _looks(config: Any) -> Callable[[int], bool]:
  """Whether the host looks at the device after a step; without the config, which is slow to read."""
  every = [n for n in (config.log_every, config.eval_every, config.checkpoint_every) if n]
  steps = config.steps
  return lambda step: step == steps or any(step % n == 0 for n in every)


def _fetched(pending: list[tuple[int, dict[str, jax.Array]]]) -> list[dict[str, Any]]:
  """Rows of numbers, and of vectors over the parameters."""
  for x in jax.tree.leaves(pending[-1][1]):
    x.copy_to_host_async()
  rows = []
  for step, metrics in pending:
    values = {name: np.asarray(x) for name, x in metrics.items()}
    rows.append({'step': step, **{k: v.item() if v.ndim == 0 else v for k, v in values.items()}})
  return rows


def evaluate_all(run: Run, state: TrainState, beat: Callable[[], None] = lambda: None) -> dict[str, float]:
  """Means of the metrics over one pass of the evaluation set; `beat` is called before each batch."""
  parts = []
  for batch in run.eval_batches():
    beat()
    parts.append(run.evaluate(state, batch))
  parts = jax.device_get(parts)
  counts = [part.pop('examples') for part in parts]
  means = {name: float(np.average([part[name] for part in parts], weights=counts)) for name in parts[0]}
  return run.task.scores(means)


def ended_without_checkpoints(run: Run, workdir: Path) -> bool:
  """Returns whether the folder holds this run's end, and no checkpoint: somebody removed them, or none were kept.

  Raises:
    ConfigError: it holds the end of a shorter or longer run, whose results a new beginning would replace.
  """
  ended = exported_step(workdir)
  if ended is None:
    return False
  if ended != run.config.steps and not arrived(run, folder.evaluations(workdir)):
    raise ConfigError(
      f'{workdir} holds the export of step {ended} and no checkpoint to go on from, and config.steps={run.config.steps} '
      'would begin anew and replace it; choose another --workdir'
    )
  return True


def arrived(run: Run, rows: list[dict[str, float]]) -> bool:
  """Whether a run that is to stop at its target has reached it."""
  return run.config.stop_at_target and first_at(run.config.target, run.task, rows) is not None


def main(config: Any, workdir: str) -> None:
  """One run from the command line."""
  if _DRY_RUN.value:
    text = plan(build(config), Path(workdir))
    if processes.chief():
      print(text)
    return
  rows = train(config, workdir, profile=_PROFILE.value)
  if not processes.chief():
    return
  if rows:
    scores = ', '.join(f'{k.removeprefix("eval_")} {v:.4g}' for k, v in rows[-1].items() if k.startswith('eval_'))
    print(f'{scores} on {config.data.name}/{config.data.eval_split} after {rows[-1]["step"]} steps')
  covers = ', what K-FAC covers (coverage.txt)' if config.optimizer in SECOND_ORDER else ''
  print(f'report.html, metrics{covers}, checkpoints and the model (export) are in {workdir}')


if __name__ == '__main__':
  launch(main)
