"""A run's work folder: whose it is, what was measured, what happened. Nothing in it is ever half written.

`config.json` says what runs here, `metrics.jsonl` has a row for every step and evaluation, `events.jsonl` what is out of
the ordinary: resumptions, faults, checkpoints that cannot be read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments import jsonfile
from experiments.configs.defaults import defaults
from experiments.errors import ConfigError, RunError

# What may change between the parts of a run: its length, what is written, and where it runs.
FREE = (
  'steps',
  'target',
  'stop_at_target',
  'eval_every',
  'log_every',
  'health_every',
  'checkpoint_every',
  'checkpoint_minutes',
  'keep_checkpoints',
  'keep_best',
  'mesh',
  'devices',
  'watchdog_seconds',
  'placement',
  'writers',
)


_FOLDERS = ('checkpoints', 'export', 'profile', 'samples', 'tensorboard', 'unreadable', 'members', 'logs')
_FILES = ('about.json', 'config.json', 'coverage.txt', 'events.jsonl', 'layers.jsonl', 'metrics.jsonl', 'report.html',
          'sweep.html', 'sweep.json', 'table.txt')  # fmt: skip


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
  """The folder, made if need be, for one run at a time. The lock ends with the process, however that ends.

  Raises:
    ConfigError: another run has it, or it cannot be made or written.
  """
  if workdir.is_symlink() and not workdir.exists():
    raise ConfigError(f'--workdir={workdir} is a link to nowhere; make what it names, or choose another --workdir')
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'--workdir={workdir} is a file, not a folder; choose another --workdir')
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / '.lock').open('a+')
  except OSError as error:
    raise ConfigError(f'--workdir={workdir}: {error.strerror}') from error
  for names, kind, is_kind in ((_FOLDERS, 'folder', Path.is_dir), (_FILES, 'file', Path.is_file)):
    wrong = next((workdir / name for name in names if (workdir / name).exists() and not is_kind(workdir / name)), None)
    if wrong is not None:
      raise ConfigError(f'{wrong} is no {kind}, which a run keeps there; remove it, or choose another --workdir')
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      lock.seek(0)
      holder = lock.read().strip() or 'another process'
      raise ConfigError(
        f'{workdir} is in use by another run ({holder}); wait for its end, or choose another --workdir'
      ) from error
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    try:
      yield
    finally:
      lock.truncate(0)


def write_about(run: Any, workdir: Path) -> None:
  """`about.json`: where and with what a run is trained, and what it is about."""
  devices = list(run.mesh.devices.flat)
  about = {
    'command': ' '.join(sys.argv),
    'devices': f'{len(devices)} x {devices[0].device_kind}, {jax.process_count()} processes',
    'host': socket.gethostname(),
    'started': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: run.init(0)).params)),
    'python': platform.python_version(),
    **{name: version(name) for name in ('jax', 'flax', 'optax', 'kronmesh')},
    'target_metric': run.task.target,
    'lower_is_better': run.task.lower_is_better,
  }
  write(workdir / 'about.json', jsonfile.dumps(about, indent=2) + '\n')


def check_same(config: Any, workdir: Path) -> None:
  """A work folder belongs to one config, see `FREE`: a resumed run must be the run that was interrupted.

  Raises:
    ConfigError: it holds another's run, or a file that is no config.
  """
  path = workdir / 'config.json'
  if path.exists():
    try:
      old = json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise ConfigError(f'{path} cannot be read as a config; choose another --workdir or remove it') from error
    if not isinstance(old, dict):
      raise ConfigError(f'{path} cannot be read as a config; choose another --workdir or remove it')
    changed = changes(old, as_json(config))
    if changed:
      raise ConfigError(
        f'{workdir} holds a run with another {", ".join(changed)}; choose another --workdir or remove it'
      )


def check_config(config: Any, workdir: Path) -> None:
  """As `check_same`, and writes the config there."""
  check_same(config, workdir)
  write(workdir / 'config.json', jsonfile.dumps(as_json(config), indent=2) + '\n')


def as_json(config: Any) -> dict[str, Any]:
  return json.loads(config.to_json())


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What of two configs differs but may not, as 'section.key'.

  What the old one lacks stands at its default: a run may go on with a newer release, which has more options.
  """
  old, new, usual = (_flat(config) for config in (old, new, as_json(defaults())))
  return [k for k, value in new.items() if k.split('.')[0] not in FREE and value != old.get(k, usual.get(k))]


def _flat(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  found: dict[str, Any] = {}
  for key, value in config.items():
    found |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return found


@contextlib.contextmanager
def storage_errors(workdir: Path) -> Iterator[None]:
  """Turns a full disk and the like into one line; what was saved before stays whole.

  Raises:
    RunError: something could not be written.
  """
  try:
    yield
  except (RunError, ConfigError):
    raise
  except Exception as error:
    words = _of_storage(error)
    if words is None:
      raise
    raise RunError(f'cannot write to {workdir}: {words}; the same command goes on from the last checkpoint') from error


def _of_storage(error: BaseException | None) -> str | None:
  """What the operating system said, of an error or of what caused it; libraries may only quote it."""
  if error is None:
    return None
  for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
    if getattr(error, 'errno', None) == number or os.strerror(number).lower() in str(error).lower():
      return os.strerror(number)
  return _of_storage(error.__cause__ or error.__context__)


def write(path: Path, text: str) -> None:
  """The whole file or none of it."""
  new = path.with_name(path.name + '.new')
  try:
    with new.open('w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    new.replace(path)
  except OSError:
    new.unlink(missing_ok=True)
    raise


def read_rows(path: Path) -> list[dict[str, Any]]:
  """The lines of a .jsonl file. Those that cannot be read, as a killed process leaves one at the end, are left out."""
  rows = []
  for line in path.read_text(errors='replace').split('\n') if path.exists() else []:
    with contextlib.suppress(ValueError):
      row = jsonfile.read_row(line)
      if isinstance(row, dict) and 'step' in row:
        rows.append(row)
  return rows


def evaluations(workdir: Path) -> list[dict[str, float]]:
  """The rows of a run's `metrics.jsonl` that carry an evaluation; none where there is no run."""
  return [row for row in read_rows(workdir / 'metrics.jsonl') if 'seconds' in row]


class Rows:
  """Lines of a .jsonl file. The file is not held open: it may be replaced between two calls."""

  def __init__(self, path: Path, chief: bool):
    self.path, self.chief = path, chief

  def add(self, rows: Iterable[dict[str, Any]]) -> None:
    if self.chief:
      with self.path.open('a') as file:
        file.write(''.join(jsonfile.dumps(row) + '\n' for row in rows))

  def drop_after(self, step: float) -> None:
    """Rows of later steps, which are logged again."""
    if self.chief and self.path.exists():
      write(self.path, ''.join(jsonfile.dumps(row) + '\n' for row in read_rows(self.path) if row['step'] <= step))


# What optimisers count, and in words.
_COUNTED = {
  'rejected_statistics': 'statistics were not finite and were dropped',
  'rejected_inverses': 'inverses were not finite and were dropped',
  'redamped_inverses': 'inverses needed more than the damping',
  'overflows': 'gradients were beyond float16; the loss scale was halved each time',
}


class Events:
  """What is out of the ordinary: each to `events.jsonl` and, in one line, to stderr. Only the chief's are written."""

  def __init__(self, workdir: Path, chief: bool, quiet: bool):
    self.path, self.chief, self.quiet = workdir / 'events.jsonl', chief, quiet
    self.counts = dict.fromkeys(_COUNTED, 0)

  def add(self, kind: str, step: int, words: str, tell: bool = True, **more: Any) -> None:
    if not self.chief:
      return
    row = {'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'kind': kind, 'step': step, 'words': words, **more}
    with self.path.open('a') as file:
      file.write(jsonfile.dumps(row) + '\n')
    if tell and not self.quiet:
      tqdm.write(f'{kind}: {words}', file=sys.stderr)  # above a progress bar, if there is one

  def count(self, row: dict[str, Any]) -> None:
    """Tells of what an optimiser counts in its state, when there is more of it."""
    for name, words in _COUNTED.items():
      now = row.get(name, 0)
      if now > self.counts[name]:
        self.add('warning', row['step'], f'by step {row["step"]}: {now:.0f} {words}', count=now)
      self.counts[name] = max(now, self.counts[name])
