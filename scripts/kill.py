"""Kills a training process at random moments, resumes it each time, and compares its end with an uninterrupted run's.

python scripts/kill.py --kills=50
python scripts/kill.py --kills=10 --processes=2

What it found on one machine is in docs/reliability.txt. Of several processes one is killed, and the others must end by
themselves. A run that ends before it is killed is compared and begun anew.
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.launch import launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import flags

from experiments import folder
from experiments.checkpoints import load_export
from experiments.errors import RunError
from kronmesh import files

_KILLS = flags.DEFINE_integer('kills', 10, 'How many times.', lower_bound=1)
_PROCESSES = flags.DEFINE_integer('processes', 1, 'Of the run.', lower_bound=1)
_OUT = flags.DEFINE_string('out', None, 'A .txt file for the result; default: in the work folder.')

# Steps of a few milliseconds, and a save after every tenth of them.
_SETTINGS = (
  '--config=experiments/configs/digits.py',
  '--config.model.widths=(64, 16)',
  '--config.data.batch_size=256',
  '--config.eval_every=100',
  '--config.log_every=5',
  '--config.checkpoint_every=10',
)
_AFTER = 1.5  # seconds of training within which it is killed


class Result(NamedTuple):
  """moments: what went on at each kill. seconds: until all had ended. ends: runs compared."""

  moments: Counter
  seconds: list[float]
  ends: int


def commands(workdir: Path, processes: int, steps: int) -> list[list[str]]:
  common = [sys.executable, 'experiments/train.py', *_SETTINGS, f'--config.steps={steps}', f'--workdir={workdir}']
  if processes == 1:
    return [[*common, '--config.devices=2', '--config.mesh=data=2']]
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  join = [f'--coordinator_address=localhost:{port}', f'--num_processes={processes}', '--config.devices=1']
  return [[*common, *join, '--config.mesh=data=-1', f'--process_id={i}'] for i in range(processes)]


def start(workdir: Path, processes: int, steps: int) -> list[subprocess.Popen]:
  log = (workdir.parent / f'{workdir.name}.log').open('ab')
  return [
    subprocess.Popen(c, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) for c in commands(workdir, processes, steps)
  ]


def kill_often(workdir: Path, kills: int, processes: int, steps: int, seed: int = 0) -> Result:
  """Trains in `workdir` once without a kill, and then again and again with them.

  Raises:
    RunError: a run ended with another code than 0, or otherwise than the uninterrupted one.
  """
  rng, moments, seconds, ends = random.Random(seed), Counter(), [], 0
  whole, parts = workdir / 'whole', workdir / 'parts'
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  _finish(start(whole, processes, steps), workdir)
  while moments.total() < kills:
    running = start(parts, processes, steps)
    begun = _wait_for_steps(parts, running)
    # One in four is killed while it starts: imports, restores, compiles.
    if begun is not None:
      time.sleep(rng.uniform(0, _AFTER))
    victim = rng.choice(running)
    if any(p.poll() is not None for p in running):
      _finish(running, workdir)
      _compare(whole, parts, steps)
      ends += 1
      shutil.rmtree(parts)
      continue
    saves = list((parts / 'checkpoints').glob('*tmp*'))
    victim.kill()
    moments['during a save' if saves else 'between saves'] += 1
    seconds.append(_ended(running, workdir))
    if rng.random() < 0.25:
      running = start(parts, processes, steps)
      time.sleep(rng.uniform(0.5, 6.0))
      rng.choice(running).kill()
      moments['while it starts'] += 1
      seconds.append(_ended(running, workdir))
  _finish(start(parts, processes, steps), workdir)
  _compare(whole, parts, steps)
  return Result(moments, seconds, ends + 1)


def _ended(running: list[subprocess.Popen], workdir: Path) -> float:
  """The seconds until all have ended, of which one was just killed."""
  killed = time.monotonic()
  for p in running:
    try:
      p.wait(60)
    except subprocess.TimeoutExpired:
      raise RunError(f'a process went on for 60 seconds after another was killed; see {workdir}') from None
  return time.monotonic() - killed


def _wait_for_steps(workdir: Path, running: list[subprocess.Popen]) -> int | None:
  """Until the run has logged a step more than there were."""
  log = workdir / 'metrics.jsonl'
  before = log.stat().st_mtime_ns if log.exists() else 0
  dropped = False
  while all(p.poll() is None for p in running):
    now = log.stat().st_mtime_ns if log.exists() else 0
    if now != before and (dropped or not before):
      return now
    if now != before:  # rows after the checkpoint have been dropped
      before, dropped = now, True
    time.sleep(0.01)
  return None


def _finish(running: list[subprocess.Popen], workdir: Path) -> None:
  codes = [p.wait() for p in running]
  if any(codes):
    raise RunError(f'a run that was not killed ended with {codes}; see the .log files in {workdir}')


def _compare(whole: Path, parts: Path, steps: int) -> None:
  """Raises RunError unless all losses and the final model are the same, bit for bit."""
  rows = [folder.read_rows(f / 'metrics.jsonl') for f in (whole, parts)]
  losses = [[(r['step'], r['loss']) for r in found if 'loss' in r] for found in rows]
  if losses[0] != losses[1] or len(losses[0]) != steps:
    first = next((a[0] for a, b in zip(*losses, strict=False) if a != b), 'none')
    raise RunError(f'losses differ: {len(losses[0])} and {len(losses[1])} of {steps} steps, first at step {first}')
  leaves = [_leaves(load_export(f / 'export')[0]) for f in (whole, parts)]
  if leaves[0].keys() != leaves[1].keys() or any(not np.array_equal(leaves[0][k], leaves[1][k]) for k in leaves[0]):
    raise RunError('the final parameters differ')


def _leaves(tree: Any, path: str = '') -> dict[str, np.ndarray]:
  if not isinstance(tree, dict):
    return {path: tree}
  return {k: v for name, part in tree.items() for k, v in _leaves(part, f'{path}/{name}').items()}


def main(config: Any, workdir: str) -> None:
  del config
  begun, kills, processes = time.monotonic(), _KILLS.value, _PROCESSES.value
  steps = 1000 if processes == 1 else 400
  result = kill_often(Path(workdir).absolute(), kills, processes, steps)
  kinds = ', '.join(f'{n} {kind}' for kind, n in result.moments.most_common())
  lines = [
    f'python scripts/kill.py --kills={kills} --processes={processes}',
    f'{result.moments.total()} kills: {kinds}',
    f'{result.ends} runs of {steps} steps came to their end: losses and parameters as uninterrupted, bit for bit',
  ]
  if processes > 1:
    lines.append(f'the other processes had ended after {max(result.seconds):.1f} s at most')
  text = '\n'.join(lines)
  path = Path(_OUT.value or Path(workdir) / 'kill.txt')
  files.write(path, text + '\n')
  print(f'{text}\n{time.monotonic() - begun:.0f} s')


if __name__ == '__main__':
  launch(main, default_workdir='runs/kill')
