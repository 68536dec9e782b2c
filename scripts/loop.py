"""Measures what the training loop adds to the bare step: metrics, progress, event files and layer logs.

python scripts/loop.py --config=digits --config.devices=1 --config.mesh=data=1

Steps and batches are timed inside the loop, and the rest of the time is the loop's. Emulated devices run a step while
the host waits, so that a step hides none of the loop's work, as it would on an accelerator. So this is the most that
the loop can add. The time of Python between the steps of a bare `for` loop, which frees their arrays, is measured in
the same way and subtracted. (On a shared machine, whole runs with and without the loop differ by more than all of
this.)
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
from absl import flags

from kronmesh import files
from kronmesh.train import jsonfile
from kronmesh.train.build import Run, build
from kronmesh.train.loop import train

_STEPS = flags.DEFINE_integer('loop_steps', 500, 'Of each run.', lower_bound=50)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Runs.', lower_bound=1)


class Timed:
  """A run whose steps and batches are timed, from step `skip` until the first evaluation."""

  def __init__(self, run: Run, skip: int):
    self.inner, self.skip = run, skip
    self.began = self.ended = None
    self.inside = 0.0
    self.run = run._replace(step=self._step, train_batches=self._batches, evaluate=self._evaluate)

  def _step(self, state: Any, batch: Any, number: int) -> Any:
    start = time.perf_counter()
    if number == self.skip:
      self.began, self.inside = start, 0.0
    out = jax.block_until_ready(self.inner.step(state, batch, number))
    self.inside += time.perf_counter() - start
    return out

  def _batches(self, seed: int, first: int) -> Iterator[Any]:
    batches = self.inner.train_batches(seed, first)
    while True:
      start = time.perf_counter()
      batch = next(batches)
      self.inside += time.perf_counter() - start
      yield batch

  def _evaluate(self, state: Any, batch: Any) -> Any:
    self.ended = self.ended or time.perf_counter()
    return self.inner.evaluate(state, batch)

  @property
  def outside(self) -> float:
    """Returns the time outside steps and batches, over the time inside them."""
    return (self.ended - self.began) / self.inside - 1


def bare(run: Run, steps: int, skip: int) -> float:
  """Measures the share of time outside steps and batches in a bare `for` loop."""
  timed = Timed(run, skip)
  state = run.init(run.config.seed)
  batches = timed.run.train_batches(run.config.seed, 0)
  for number in range(steps):
    state, _ = timed.run.step(state, next(batches), number)
  timed.ended = time.perf_counter()
  return timed.outside


def measure(config: Any, steps: int, rounds: int) -> dict[str, Any]:
  """Measures the share that the loop adds in each round, without the first round, which compiles."""
  config.steps, config.eval_every, config.keep_checkpoints = steps, steps, 0
  config.stop_at_target = False
  run, skip, shares, paces = build(config), 2 * config.log_every, [], []
  for _ in range(rounds + 1):
    timed = Timed(run, skip)
    with (
      tempfile.TemporaryDirectory() as workdir,
      open(os.devnull, 'w') as nowhere,
      contextlib.redirect_stdout(nowhere),
    ):
      train(config, workdir, run=timed.run)
    shares.append(timed.outside - bare(run, steps, skip))
    paces.append(1000 * timed.inside / (steps - skip))
  return {'steps': steps, 'added': statistics.median(shares[1:]), 'each': shares[1:], 'ms_per_step': paces[1:]}


def main(config: Any, workdir: str) -> None:
  result = measure(config, _STEPS.value, _ROUNDS.value)
  text = (
    f'the loop adds {result["added"]:.2%} ({min(result["each"]):.2%} to {max(result["each"]):.2%}) to a step of '
    f'{statistics.median(result["ms_per_step"]):.1f} ms: {_ROUNDS.value} runs of {_STEPS.value} steps'
  )
  path = Path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  files.write(path / 'loop.json', jsonfile.dumps(result, indent=1) + '\n')
  files.write(path / 'loop.txt', text + '\n')
  print(text)


if __name__ == '__main__':
  launch(main, default_workdir='runs/loop')
