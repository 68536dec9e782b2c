"""What a run was trained with and where: `about.json`."""

from __future__ import annotations

import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ... import files
from .. import jsonfile


def write_about(run: Any, workdir: Path) -> None:
  """Writes `about.json`: the machine, the code, the number of parameters and the target metric of a run."""
  devices, processes = list(run.mesh.devices.flat), jax.process_count()
  about = {
    'command': ' '.join([sys.argv[0], *map(shlex.quote, sys.argv[1:])]),
    'started_in': os.getcwd(),
    'git_commit': git_commit(),
    'devices': f'{len(devices)} x {devices[0].device_kind}, {processes} {"process" if processes == 1 else "processes"}',
    'host': socket.gethostname(),
    'started': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: run.init(0)).params)),
    'python': platform.python_version(),
    **{name: version(name) for name in ('jax', 'flax', 'optax', 'kronmesh')},
    'target_metric': run.task.target,
    'lower_is_better': run.task.lower_is_better,
  }
  files.write(workdir / 'about.json', jsonfile.dumps(about, indent=2) + '\n')


def git_commit() -> str:
  """Returns the commit of the git checkout that this process runs in, '+ changes' if files differ from it, or ''."""

  def git(*words: str) -> str:
    # Neither a hook nor a lock of the checkout is used.
    command = ['git', '-c', 'core.fsmonitor=false', '--no-optional-locks', *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

  try:
    commit = git('rev-parse', 'HEAD')
    return f'{commit} + changes' if git('status', '--porcelain', '--untracked-files=no') else commit
  except (OSError, subprocess.SubprocessError, ValueError):  # no git, no checkout, or a very slow disk
    return ''
