"""Kills a training process at random moments, resumes it each time, and compares it with an uninterrupted run.

python scripts/kill.py --kills=50
python scripts/kill.py --kills=500 --meshes --processes --seed=0

On one mesh, losses and parameters must be the same bit for bit. With --meshes every start draws another mesh, and with
--processes a start may be a run of two processes. Both train in float64 and must agree to 1e-6. If there are several
processes, one is killed and the others must end by themselves. A run that ends before it is killed is compared and
started anew.

The results from one machine are in docs/reliability.txt.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kronmesh.train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import flags

from kronmesh import files
from kronmesh.train.checkpoints import load_export
from kronmesh.train.errors import RunError
from kronmesh.train.runtime.workdir import read_rows

_KILLS = flags.DEFINE_integer('kills', 10, 'How many times.', lower_bound=1)
_MESHES = flags.DEFINE_bool('meshes', False, 'Draw another mesh at every start.')
_PROCESSES = flags.DEFINE_bool('processes', False, 'Draw runs of two processes too.')
_SEED = flags.DEFINE_integer('seed', 0, 'The seed by which moments, meshes and processes are drawn.')
_OUT = flags.DEFINE_string('out', None, 'A .txt file for the result; default: in the work folder.')

# Steps of a few milliseconds, with a save after every tenth step.
_SETTINGS = (
  '--config=digits',
  '--config.model.widths=(64, 16)',
  '--config.data.batch_size=256',
  '--config.eval_every=100',
  '--config.log_every=5',
  '--config.checkpoint_every=10',
)
# At the config's learning rate a rounding difference grows tenfold every few steps. At this rate it does not.
_CALM = ['--config.model.dtype=float64', '--config.kfac.learning_rate=0.02', '--config.kfac.momentum=0.0']
_APART = 1e-6  # the largest difference between runs on different meshes, over the largest value
_AFTER = 1.5  # seconds of training within which a process is killed
# Seconds for the others to end. One that still imports waits 40 seconds for a lost peer, and a busy machine is slow.
_PATIENCE = 180


class Layout(NamedTuple):
  """The processes and mesh on which a run is trained. devices: the number for each process."""

  processes: int
  devices: int
  mesh: str


ONE = Layout(1, 2, 'data=2')
TWO = Layout(2, 1, 'data=2')
_MESHES_OF_ONE = Layout(1, 1, 'data=1'), Layout(1, 4, 'data=2,model=2'), Layout(1, 2, 'model=2')
_MESHES_OF_TWO = Layout(2, 2, 'data=2,model=2'), Layout(2, 2, 'model=2,data=2')


class Result(NamedTuple):
  """The results of the kills.

  moments: the number of kills by what the run was doing. seconds: the time after each kill until all processes had
  ended. ends: the number of runs compared. starts: the number of starts by layout. apart: the largest relative
  difference of a loss or parameter from the uninterrupted run's.
  """

  moments: Counter
  seconds: list[float]
  ends: int
  starts: Counter
  apart: float


def commands(workdir: Path, layout: Layout, steps: int, exact: bool) -> list[list[str]]:
  common = [sys.executable, 'experiments/train.py', *_SETTINGS, f'--config.steps={steps}', f'--workdir={workdir}']
  common += [f'--config.devices={layout.devices}', f'--config.mesh={layout.mesh}']
  common += [] if exact else _CALM
  if layout.processes == 1:
    return [common]
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  join = [f'--coordinator_address=localhost:{port}', f'--num_processes={layout.processes}']
  return [[*common, *join, f'--process_id={i}'] for i in range(layout.processes)]


def start(workdir: Path, layout: Layout, steps: int, exact: bool) -> list[subprocess.Popen]:
  log = (workdir.parent / f'{workdir.name}.log').open('ab')
  env = os.environ if exact else {**os.environ, 'JAX_ENABLE_X64': '1'}
  return [
    subprocess.Popen(c, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env)
    for c in commands(workdir, layout, steps, exact)
  ]


def kill_often(workdir: Path, kills: int, layouts: Sequence[Layout], steps: int, seed: int = 0) -> Result:
  """Trains in `workdir` once without kills, and then repeatedly with kills.

  layouts: the layouts from which each start draws one. The uninterrupted run has the first.

  Raises:
    RunError: a run ended with another code than 0, or with other results than the uninterrupted one.
  """
  rng, moments, seconds, ends, apart = random.Random(seed), Counter(), [], 0, 0.0
  whole, parts, starts, exact = workdir / 'whole', workdir / 'parts', Counter(), len(layouts) == 1
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  _finish(start(whole, layouts[0], steps, exact), workdir)

  def begin() -> list[subprocess.Popen]:
    layout = rng.choice(layouts)
    starts[layout] += 1
    return start(parts, layout, steps, exact)

  while moments.total() < kills:
    running = begin()
    begun = _wait_for_steps(parts, running)
    if begun is not None:
      time.sleep(rng.uniform(0, _AFTER))
    victim = rng.choice(running)
    if any(p.poll() is not None for p in running):
      _finish(running, workdir)
      apart = max(apart, _compare(whole, parts, steps, exact))
      ends += 1
      shutil.rmtree(parts)
      continue
    saves = list((parts / 'checkpoints').glob('*tmp*'))
    victim.kill()
    moments['during a save' if saves else 'between saves'] += 1
    seconds.append(_ended(running, workdir))
    if rng.random() < 0.25:  # one in four is also killed while it starts: imports, restores, compiles
      running = begin()
      time.sleep(rng.uniform(0.5, 6.0))
      rng.choice(running).kill()
      moments['while it starts'] += 1
      seconds.append(_ended(running, workdir))
  _finish(begin(), workdir)
  apart = max(apart, _compare(whole, parts, steps, exact))
  return Result(moments, seconds, ends + 1, starts, apart)


def _ended(running: list[subprocess.Popen], workdir: Path) -> float:
  """Waits for all processes to end after one was killed, and returns the seconds that it took."""
  killed = time.monotonic()
  for p in running:
    try:
      p.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      words = f'a process went on for {_PATIENCE} seconds after another was killed; see {workdir}'
      raise RunError(words) from None
  return time.monotonic() - killed


def _wait_for_steps(workdir: Path, running: list[subprocess.Popen]) -> int | None:
  """Waits until the run has logged new steps, or returns None if a process ends first."""
  log = workdir / 'metrics.jsonl'
  before = log.stat().st_mtime_ns if log.exists() else 0
  dropped = False
  while all(p.poll() is None for p in running):
    now = log.stat().st_mtime_ns if log.exists() else 0
    if now != before and (dropped or not before):
      return now
    if now != before:  # the run has dropped rows of steps after the checkpoint
      before, dropped = now, True
    time.sleep(0.01)
  return None


def _finish(running: list[subprocess.Popen], workdir: Path) -> None:
  codes = [p.wait() for p in running]
  if any(codes):
    raise RunError(f'a run that was not killed ended with {codes}; see the .log files in {workdir}')


def _compare(whole: Path, parts: Path, steps: int, exact: bool) -> float:
  """Returns the largest relative difference between the losses, and between the parameters of the final models.

  Raises:
    RunError: some are missing, or they differ at all, or, if the runs were on several meshes, by more than 1e-6.
  """
  rows = [read_rows(f / 'metrics.jsonl') for f in (whole, parts)]
  losses = [[(r['step'], r['loss']) for r in rows_of_run if 'loss' in r] for rows_of_run in rows]
  if [step for step, _ in losses[0]] != [step for step, _ in losses[1]] or len(losses[0]) != steps:
    raise RunError(f'steps differ: {len(losses[0])} and {len(losses[1])} of {steps}')
  values = [
    {'losses': np.array([loss for _, loss in steps_of_run]), **_leaves(load_export(f / 'export')[0])}
    for steps_of_run, f in zip(losses, (whole, parts), strict=True)
  ]
  if values[0].keys() != values[1].keys():
    raise RunError('the parameters of the final model are others')
  worst = 0.0
  for name, x in values[0].items():
    off = float(np.abs(x - values[1][name]).max(initial=0) / max(np.abs(x).max(initial=0), 1e-30))
    if (exact and not np.array_equal(x, values[1][name])) or not off <= _APART:
      raise RunError(f'{name} of the run that was killed is off by {off:.1e} of its largest value')
    worst = max(worst, off)
  return worst


def _leaves(tree: Any, path: str = '') -> dict[str, np.ndarray]:
  if not isinstance(tree, dict):
    return {path: tree}
  return {k: v for name, part in tree.items() for k, v in _leaves(part, f'{path}/{name}').items()}


def main(config: Any, workdir: str) -> None:
  del config
  begun, kills = time.monotonic(), _KILLS.value
  layouts = [ONE, *(_MESHES_OF_ONE if _MESHES.value else ())]
  layouts += [TWO, *(_MESHES_OF_TWO if _MESHES.value else ())] if _PROCESSES.value else []
  steps = 1000 if len(layouts) == 1 else 400
  result = kill_often(Path(workdir).absolute(), kills, layouts, steps, _SEED.value)
  kinds = ', '.join(f'{n} {kind}' for kind, n in result.moments.most_common())
  given = [f'--{flag.name}' for flag in (_MESHES, _PROCESSES) if flag.value]
  given += [f'--seed={_SEED.value}'] if _SEED.value else []
  how = 'bit for bit' if len(layouts) == 1 else f'to {result.apart:.1e} of the largest value, in float64'
  lines = [
    f'python scripts/kill.py --kills={kills} {" ".join(given)}'.rstrip(),
    f'{result.moments.total()} kills: {kinds}',
    f'{result.ends} runs of {steps} steps came to their end: losses and parameters as uninterrupted, {how}',
  ]
  if len(layouts) > 1:
    drawn = (
      f'{n} x {layout.processes} processes of {layout.devices} devices, {layout.mesh}'
      for layout, n in result.starts.items()
    )
    lines.append(f'starts: {"; ".join(sorted(drawn))}')
  if _PROCESSES.value:
    lines.append(f'all processes had ended {max(result.seconds):.1f} s at most after one was killed')
  text = '\n'.join(lines)
  path = Path(_OUT.value or Path(workdir) / 'kill.txt')
  files.write(path, text + '\n')
  print(f'{text}\n{time.monotonic() - begun:.0f} s')


if __name__ == '__main__':
  launch(main, default_workdir='runs/kill')
