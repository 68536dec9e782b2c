"""The command that trains one config: `python experiments/train.py`, or `python -m kronmesh.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from .build import build
from .loop import train
from .optimizers import SECOND_ORDER
from .planning.plan import plan
from .runtime import processes

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
