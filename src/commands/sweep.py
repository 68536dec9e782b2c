"""Trains a config with several settings, in processes of this machine or on Slurm, and compares them.

  kronmesh sweep --config=digits --sweep='kfac.damping=1e-3,1e-2;seed=0..4' --workers=2
  kronmesh sweep --config=digits --cluster=slurm --slurm=partition=gpu,gpus_per_node=1

Without --sweep, the config's own `sweep()` yields the settings. Each member of the sweep is a run in its own folder
below `members/`. A second call goes on: it keeps members that are done and resumes the others. If a member fails, the
others go on. `table.txt`, `sweep.json` and `sweep.html` are renewed whenever a member ends.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from ..train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from ..train.errors import ConfigError, Preempted, RunError
from ..train.runtime.starting import STOP
from ..train.runtime.workdir import claimed, storage_errors
from ..train.sweeps.sweep import Sweep, members_of, other_data, run_here, run_on_cluster

_SWEEP = flags.DEFINE_string('sweep', None, "key=value,value;key=first..last; else the config's own sweep().")
_WORKERS = flags.DEFINE_integer('workers', 1, 'Members that train at the same time here.', lower_bound=1)
_GPUS = flags.DEFINE_list('gpus', [], 'CUDA devices, one for each worker: --gpus=0,1,2,3.')
_CLUSTER = flags.DEFINE_enum('cluster', '', ['', 'slurm', 'local'], "Through submitit; '': own processes.")
_SLURM = flags.DEFINE_list('slurm', [], "submitit's parameters: partition=gpu,gpus_per_node=1,timeout_min=600.")


def _interrupt(number: int, frame: Any) -> None:
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise Preempted('told to stop: members save; the same command goes on')


def main(config: Any, workdir: str) -> None:
  """Trains the members of a sweep that are not done, and compares all."""
  for number in (*STOP, signal.SIGINT):  # so that members are told to save
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _interrupt)
  path = Path(workdir).absolute()
  members = members_of(config, path, _SWEEP.value)
  if _GPUS.value and len(_GPUS.value) < _WORKERS.value:
    raise ConfigError(f'--gpus={",".join(_GPUS.value)} is fewer than --workers={_WORKERS.value}')
  with claimed(path), storage_errors(path):
    sweep = Sweep(config, path, members)
    where = f'on {_CLUSTER.value}' if _CLUSTER.value else f'{_WORKERS.value} at a time'
    print(f'{len(sweep.waiting())} of {len(members)} members to train, {where}; logs in {path / "logs"}', flush=True)
    if sweep.waiting() and _CLUSTER.value:
      run_on_cluster(sweep, _CLUSTER.value, _SLURM.value)
    elif sweep.waiting():
      run_here(sweep, _WORKERS.value, _GPUS.value)
    print(f'\n{sweep.finish()}\n\ncompared in {path / "sweep.html"}')
  other = other_data([m for m in sweep.members.values() if m.state == 'done'])
  if other:
    raise RunError(f'{other}; remove the folders of those that are to be trained again')
  failed = [m for m in sweep.members.values() if m.state == 'failed']
  if failed:
    raise RunError(f'{len(failed)} of {len(members)} members failed, first {failed[0].name}: {failed[0].words}')


def command() -> None:
  """Trains the members that the command line names."""
  launch(main, default_workdir='runs/sweep')
