"""Measures the cost of second order against SGD and AdamW: step times, memory, compilation, and parts against floors.

python scripts/overhead.py --config=noise:small_resnet --out=docs/overhead/small_resnet

All members run in one process, one step of each in turn, starting at a step where intervals no longer grow. Any config
works. experiments/configs/noise.py has models on noise, including large ones for a GPU. --config.data.batch_size,
.model.dtype, .mesh and .kfac.* choose the rest. Times are ratios to SGD's median step, and on a GPU also milliseconds.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kronmesh.train import jsonfile
from kronmesh.train.build import Run, build
from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.optimizers import SECOND_ORDER
from kronmesh.train.planning.programs import abstract, compile_all, programs_of
from kronmesh.train.runtime.machine import machine
from kronmesh.train.sweeps.variants import member
from scripts.floors import floors
from scripts.overhead_tables import report, summary

EVERYTHING = 'kfac:statistics_every=1:inverses_every=1:subsample=1.0'
_OUT = flags.DEFINE_string('out', None, 'Where to write OUT.txt and OUT.json; nothing is written without it.')
_MEMBERS = flags.DEFINE_list(
  'optimizers',
  ['sgd', 'adam', 'kfac', 'kfac:fisher=sampled', EVERYTHING],
  'sgd first; settings behind colons.',
)
_BLOCKS = flags.DEFINE_integer(
  'blocks', 3, 'How many intervals are timed; their median counts. 0: nothing runs, all is compiled.', lower_bound=0
)
_COMPILES = flags.DEFINE_integer('compiles', 1, 'How often each program is compiled; the median counts.', lower_bound=1)


class Member(NamedTuple):
  """An optimiser that is ready to be timed. first: the number of its first timed step."""

  name: str
  run: Run
  first: int
  period: int


def prepare(config: Any, name: str) -> Member:
  variant, _ = member(config, name)
  if variant.optimizer in SECOND_ORDER:
    section = variant[variant.optimizer]
    period = math.lcm(section.statistics_every, section.inverses_every)
    first = 32 * max(section.statistics_every, section.inverses_every)  # kron.growing no longer grows
    return Member(name, build(variant), -(-first // period) * period, period)
  return Member(name, build(variant), 0, 1)


def interleaved(members: list[Member], blocks: int) -> dict[str, list[float]]:
  """Measures the seconds of each step of each member, with one step of each in turn."""
  length = max(m.period for m in members) * blocks
  states, batches, times = {}, {}, {m.name: [] for m in members}
  for m in members:
    states[m.name], batches[m.name] = m.run.init(0), next(m.run.train_batches(0, 0))
    for number in (0, *_kinds(m)):  # compiles
      states[m.name], metrics = m.run.step(states[m.name], batches[m.name], number)
  for i in range(-1, length):  # the first turn does not count
    for m in members:
      jax.block_until_ready(states[m.name])
      start = time.perf_counter()
      states[m.name], metrics = jax.block_until_ready(m.run.step(states[m.name], batches[m.name], m.first + i))
      if i >= 0:
        times[m.name].append(time.perf_counter() - start)
      if not np.isfinite(float(metrics['loss'])):
        raise RunError(f'{m.name}: the loss is {metrics["loss"]} at step {i}; times of such a run mean nothing')
  return times


def _kinds(m: Member) -> list[int]:
  """Returns the numbers of steps that together run every program, in the order of an interval."""
  return list(range(m.first, m.first + m.period)) if m.period > 1 else [m.first]


def parts(m: Member, blocks: int) -> dict[str, float]:
  """Measures the seconds per step of each part of a run with an inverse schedule, waiting for each program."""
  run, batch = m.run, next(m.run.train_batches(0, 0))
  state = run.init(0)
  gradients: dict[bool, list[float]] = {False: [], True: []}
  others: dict[str, list[float]] = {'inverses': [], 'update': []}

  def timed(into: list[float], fn: Callable, *args: Any) -> Any:
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    into.append(time.perf_counter() - start)
    return out

  for number in range(m.first - m.period, m.first + blocks * m.period):
    if number == m.first:  # all is compiled
      gradients, others = {False: [], True: []}, {'inverses': [], 'update': []}
    due = run.inverse_schedule.statistics_due(number)
    if m.period == 1:  # every step has statistics: time one without, for comparison
      state, _, _ = timed(gradients[False], run.programs['gradient'], state, batch, False)
    state, grads, _ = timed(gradients[due], run.programs['gradient'], state, batch, due)
    opt_state = timed(others['inverses'], run.inverse_schedule.refresh, state.opt_state, number)
    state, _ = timed(others['update'], run.programs['update'], state._replace(opt_state=opt_state), grads)
  plain, full = (statistics.median(gradients[k]) if gradients[k] else math.nan for k in (False, True))
  share = len(gradients[True]) / len(others['update'])
  return {
    'gradient': plain,
    'statistics': (full - plain) * share,
    'inverses': statistics.fmean(others['inverses']),
    'update': statistics.median(others['update']),
  }


def main(config: Any, workdir: str) -> None:
  del workdir
  names = _MEMBERS.value
  if names[0] != 'sgd' or len(names) < 2:
    raise ConfigError('--optimizers: name sgd first, and another')
  jax.config.update('jax_enable_compilation_cache', False)
  members = [prepare(config, name) for name in names]
  jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()  # the first compilation takes longer
  compiled = {}
  for m in members:
    state, batch = abstract(m.run)
    rounds = [compile_all(programs_of(m.run, state, batch), state, batch) for _ in range(_COMPILES.value)]
    compiled[m.name] = {
      name: {**times, 'seconds': statistics.median(r[name]['seconds'] for r in rounds)}
      for name, times in rounds[0].items()
    }
  here = machine(config.model.get('dtype', 'float32'))
  result = {'device': here._asdict(), 'config': json.loads(config.to_json()), 'programs': compiled}
  if _BLOCKS.value:
    times = interleaved(members, _BLOCKS.value)
    kept = [m for m in members if m.run.inverse_schedule is not None]
    result |= {
      'steps': summary(times, max(m.period for m in members)),
      'times': times,
      'parts': {m.name: parts(m, 1) for m in kept},
    }
    result['floors'] = {m.name: floors(m.run, here) for m in kept}
  text = report(result)
  print(text)
  if _OUT.value:
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(_OUT.value + '.txt').write_text(text + '\n')
    Path(_OUT.value + '.json').write_text(jsonfile.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  launch(main)
