"""Compares kron with a reference on random programs, and prints how many are exact, refused or wrong.

python scripts/random_programs.py --seed=0 --programs=300

Each program is made from one seed (tests/kron/random_programs.py). A block is exact if it equals the reference
(tests/kron/random_reference.py) to 1e-5 of its largest entry, in float64. `--only=SEED` shows one program.
"""

from __future__ import annotations

import collections
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import jax
from absl import app, flags

_SEED = flags.DEFINE_integer('seed', 0, 'The seed of the first program; the others follow it.')
_PROGRAMS = flags.DEFINE_integer('programs', 300, 'How many programs. Every eighth is a data-parallel step.')
_ONLY = flags.DEFINE_integer('only', None, 'Print the outcome and the blocks of the program of this seed alone.')
_AVOID = flags.DEFINE_list('avoid', [], 'Kinds that are not drawn.')


def report(outcomes) -> list[str]:
  """Formats the tables: a row for each kind of program, the refusals, and the wrong programs with their seeds."""
  counts = collections.defaultdict(collections.Counter)
  for o in outcomes:
    for kind in ('all programs', f'fisher: {o.fisher}', *o.kinds):
      counts[kind][o.status] += 1
  order = sorted(counts, key=lambda kind: -sum(counts[kind].values()))
  rows = ['| kind | programs | exact | refused | wrong | error |', '|---|---|---|---|---|---|']
  for kind in order:
    c = counts[kind]
    rows.append(f'| {kind} | {sum(c.values())} | {c["exact"]} | {c["refused"]} | {c["wrong"]} | {c["error"]} |')
  rows.append(
    f'\nlargest error of an exact program: {max((o.error for o in outcomes if o.status == "exact"), default=0):.1e}'
  )
  refusals = collections.defaultdict(list)
  for o in outcomes:
    if o.status == 'refused':
      refusals[shortened(o.detail)].append(o.seed)
  rows += ['\n| refused | message | seeds |', '|---|---|---|']
  for message, seeds in sorted(refusals.items(), key=lambda item: -len(item[1])):
    rows.append(f'| {len(seeds)} | {message} | {", ".join(map(str, seeds[:6]))} |')
  rows += ['\n| seed | status | kinds | what |', '|---|---|---|---|']
  for o in outcomes:
    if o.status in ('wrong', 'error'):
      rows.append(f'| {o.seed} | {o.status} | {o.fisher}, {", ".join(o.kinds)} | {o.detail} |')
  return rows


def main(argv: list[str]) -> None:
  del argv
  Draw.avoid = frozenset(_AVOID.value)
  if _ONLY.value is not None:
    for check in (check_plain, check_sharded):
      print(check(_ONLY.value))
    return
  outcomes = []
  for seed in range(_SEED.value, _SEED.value + _PROGRAMS.value):
    outcomes += sweep([seed])
    if outcomes[-1].status in ('wrong', 'error'):
      print(f'seed {seed}: {outcomes[-1].status}, {outcomes[-1].detail}', file=sys.stderr, flush=True)
  print('\n'.join(report(outcomes)))


if __name__ == '__main__':
  jax.config.update('jax_enable_x64', True)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  jax.config.update('jax_cpu_enable_async_dispatch', False)

from tests.kron.random_check import check as check_plain
from tests.kron.random_check import shortened
from tests.kron.random_layers import Draw
from tests.kron.random_sharded import check_sharded, sweep

if __name__ == '__main__':
  app.run(main)
