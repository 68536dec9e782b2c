"""Trains one config: mesh, data, model, state, step, loop.

  kronmesh train --config=digits --workdir=runs/digits
  kronmesh train --config=digits --config.optimizer=adam --config.adam.learning_rate=3e-3 --workdir=runs/adam
  kronmesh train --config=my_config.py --dry_run

Without --config it trains digits. A second call with the same --workdir goes on from the last checkpoint. The folder
gets a page about the run (report.html), metrics, checkpoints and the trained model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from ..train.build import build
from ..train.loop import train
from ..train.optimizers import SECOND_ORDER
from ..train.planning.plan import plan
from ..train.runtime import processes

_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check the config, print what would run, and end. Nothing is written.')
_PROFILE = flags.DEFINE_string('profile', None, 'FIRST:LAST, the steps that are traced into the folder `profile`.')


def main(config: Any, workdir: str) -> None:
  """Plans or trains one run from the command line."""
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


def command() -> None:
  """Trains the config that the command line names."""
  launch(main)
