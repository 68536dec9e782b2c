"""A run's work folder: which run holds it, its measurements and its events. Files in it are never half written.

`config.json` holds the run's config. `metrics.jsonl` has a row for every step and evaluation. `events.jsonl` records
unusual events: resumptions, faults and checkpoints that cannot be read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ... import files
from .. import jsonfile
from ..errors import ConfigError, RunError, StorageError
from ..settings.defaults import defaults

# Options that may change when a run is resumed: its length, what it writes, and where it runs.
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


_FOLDERS = (
  'checkpoints',
  'export',
  'profile',
  'samples',
  'tensorboard',
  'unreadable',
  'logs',
  'members',
  'submitit',
  '.processes',
  'left_out',
)
_FILES = ('about.json', 'config.json', 'coverage.txt', 'data.json', 'events.jsonl', 'layers.jsonl', 'metrics.jsonl',
          'predictions.json', 'report.html', 'sweep.html', 'sweep.json', 'table.txt', 'trials.jsonl', '.lock')  # fmt: skip


class Claim:
  """A work folder that this process holds. The lock ends with the process, however the process ends."""

  def __init__(self, workdir: Path, lock: TextIO):
    self.workdir, self._lock = workdir, lock

  def check(self) -> None:
    """Raises StorageError if the folder is no longer the one that was claimed.

    If a disk is unmounted or a folder is moved, the run would go on in an empty folder of the same name.
    """
    mine = os.fstat(self._lock.fileno())
    try:
      there = os.stat(self.workdir / '.lock')
    except OSError:
      there = None
    if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
      raise StorageError(
        f'{self.workdir} is no longer the folder in which this run began: it was moved or removed, or its disk unmounted; '
        'bring it back, and the same command goes on from the last checkpoint'
      )


@contextlib.contextmanager
def claimed(workdir: Path, patience: float = 0.0) -> Iterator[Claim]:
  """Claims the folder for one run at a time, and makes it if it does not exist.

  patience: seconds to wait for another process that holds it.

  Raises:
    ConfigError: another run holds it, it cannot be made or written, or something in it is a link.
  """
  if workdir.is_symlink() and not workdir.exists():
    raise ConfigError(f'--workdir={workdir} is a link to nowhere; make what it names, or choose another --workdir')
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'--workdir={workdir} is a file, not a folder; choose another --workdir')
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    check_contents(workdir)
    files.make_own(workdir / '.lock')
    number = os.open(workdir / '.lock', os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  except OSError as error:
    raise ConfigError(f'--workdir={workdir}: {error.strerror}') from error
  with open(number, 'r+') as lock:
    _lock(lock, workdir, patience)
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    try:
      yield Claim(workdir, lock)
    finally:
      with contextlib.suppress(OSError):
        lock.truncate(0)


def check_free(workdir: Path, patience: float = 0.0) -> None:
  """Raises ConfigError if another run holds the folder.

  Call it before processes join, because they could join those of the other run.
  """
  try:
    number = os.open(workdir / '.lock', os.O_RDWR | os.O_NOFOLLOW)
  except OSError:
    return  # there is no lock yet, or `claimed` says what is wrong with it
  with open(number, 'r+') as lock:
    _lock(lock, workdir, patience)


def _lock(lock: TextIO, workdir: Path, patience: float) -> None:
  """Takes the lock, or raises ConfigError."""
  end = time.monotonic() + patience
  while True:
    try:
      return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      if time.monotonic() > end:
        lock.seek(0)
        holder = lock.read().strip() or 'another process'
        raise ConfigError(
          f'{workdir} is in use by another run ({holder}); wait for its end, or choose another --workdir'
        ) from error
      time.sleep(0.1)
    except OSError as error:
      raise ConfigError(
        f'the file system of {workdir} has no locks ({error.strerror}), without which two runs could write one folder; '
        'choose a --workdir on another disk, or have it mounted with locks'
      ) from error


def check_contents(workdir: Path) -> None:
  """Refuses a work folder in which a name that a run writes is a link or of the wrong kind.

  Work folders may come from strangers. A link would have the run write elsewhere, perhaps over a file of the user.

  Raises:
    ConfigError: a name that a run writes is of another kind, or is or contains a link.
  """
  for names, kind, is_kind in ((_FOLDERS, 'folder', Path.is_dir), (_FILES, 'file', Path.is_file)):
    for path in (workdir / name for name in names):
      odd = files.first_odd(path)
      if odd is not None:
        raise ConfigError(
          f'{odd[0]} is {odd[1]}, through which a run does not write; remove it, or choose another --workdir '
          '(which may be a link itself)'
        )
      if path.exists() and not is_kind(path):
        raise ConfigError(f'{path} is not a {kind}, which a run keeps there; remove it, or choose another --workdir')


def check_same(config: Any, workdir: Path) -> None:
  """Checks that a work folder belongs to this config, apart from the options in `FREE`.

  Raises:
    ConfigError: the folder holds the run of another config, or a file that is no config.
  """
  path = workdir / 'config.json'
  if path.exists():
    try:
      old = jsonfile.read(path)
    except (OSError, ValueError) as error:
      raise ConfigError(f'{path} cannot be read as a config; choose another --workdir or remove it') from error
    if not isinstance(old, dict):
      raise ConfigError(f'{path} cannot be read as a config; choose another --workdir or remove it')
    changed = changes(old, as_json(config))
    if changed:
      raise ConfigError(
        f'{workdir} holds a run with another {", ".join(changed)}; choose another --workdir or remove it'
      )


def check_data(known_by: dict[str, Any], workdir: Path) -> None:
  """Checks that a resumed run uses the same data as before, and writes what identifies them to `data.json`.

  Raises:
    ConfigError: the data are different.
  """
  path = workdir / 'data.json'
  try:
    before = jsonfile.read(path)
  except (OSError, ValueError):
    before = {}
  now = json.loads(jsonfile.dumps(known_by))
  other = next((k for k, v in now.items() if isinstance(before, dict) and k in before and before[k] != v), None)
  if other is not None:
    raise ConfigError(
      f'{workdir} holds a run on other data: {other} was {before[other]} and is {now[other]}; bring those data back, or '
      'choose another --workdir'
    )
  files.write(path, jsonfile.dumps(now, indent=2) + '\n')


def check_config(config: Any, workdir: Path) -> None:
  """Runs `check_same`, then writes the config into the work folder."""
  check_same(config, workdir)
  files.write(workdir / 'config.json', jsonfile.dumps(as_json(config), indent=2) + '\n')


def as_json(config: Any) -> dict[str, Any]:
  return json.loads(config.to_json())


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Returns the keys, as 'section.key', that differ between two configs although they must not.

  Keys that the old config lacks count as defaults, so that a run may go on with a newer release, which has more
  options.
  """
  old, new, usual = (flat(config) for config in (old, new, as_json(defaults())))
  return [k for k, value in new.items() if k.split('.')[0] not in FREE and value != old.get(k, usual.get(k))]


def flat(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns a config's values, keyed by 'section.key'."""
  flattened: dict[str, Any] = {}
  for key, value in config.items():
    flattened |= flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flattened


@contextlib.contextmanager
def storage_errors(workdir: Path) -> Iterator[None]:
  """Turns storage errors, such as a full disk, into one line. Earlier saves stay intact.

  Raises:
    StorageError: something could not be written.
  """
  try:
    yield
  except (RunError, ConfigError):
    raise
  except Exception as error:
    words = _of_storage(error)
    if words is None:
      raise
    raise StorageError(
      f'cannot write to {workdir}: {words}; the same command goes on from the last checkpoint'
    ) from error


def _of_storage(error: BaseException | None) -> str | None:
  """Returns the operating system's message if an error or one of its causes is a storage error, else None.

  Libraries may only quote that message in theirs.
  """
  if error is None:
    return None
  for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
    if getattr(error, 'errno', None) == number or os.strerror(number).lower() in str(error).lower():
      return os.strerror(number)
  return _of_storage(error.__cause__ or error.__context__)


def read_log(path: Path) -> jsonfile.Lines:
  """Reads the rows of a run's .jsonl file, and counts rows without a step as unreadable."""
  rows, bad = jsonfile.read_lines(path)
  with_step = [row for row in rows if isinstance(row.get('step'), int | float) and math.isfinite(row['step'])]
  return jsonfile.Lines(with_step, bad + len(rows) - len(with_step))


def read_rows(path: Path) -> list[dict[str, Any]]:
  """Returns the readable rows of a run's .jsonl file."""
  return read_log(path).rows


def evaluations(workdir: Path) -> list[dict[str, float]]:
  """Returns the rows of a run's `metrics.jsonl` that hold an evaluation; none if there is no run."""
  return [row for row in read_rows(workdir / 'metrics.jsonl') if 'seconds' in row]


class Rows:
  """The rows of a .jsonl file. The file is not kept open, so it may be replaced between two calls."""

  def __init__(self, path: Path, chief: bool):
    self.path, self.chief = path, chief

  def add(self, rows: Iterable[dict[str, Any]]) -> None:
    if self.chief:
      files.append_lines(self.path, map(jsonfile.dumps, rows))

  def drop_after(self, step: float) -> int:
    """Removes the rows of later steps, which will be logged again, and returns the number of unreadable lines."""
    if not self.chief or not self.path.exists():
      return 0
    log = read_log(self.path)
    files.write(self.path, ''.join(jsonfile.dumps(row) + '\n' for row in log.rows if row['step'] <= step))
    return log.bad


_DIVERGES = 100.0  # a run diverges if its loss grows by this many times the first loss
# Counters of the optimisers, with a description of each.
_COUNTED = {
  'rejected_statistics': 'statistics were not finite and were dropped',
  'rejected_inverses': 'inverses were not finite and were dropped',
  'redamped_inverses': 'inverses needed more than the damping',
  'overflows': 'gradients were beyond float16; the loss scale was halved each time',
}


class Events:
  """Unusual events of a run. The chief writes each to `events.jsonl` and, as one line, to stderr."""

  def __init__(self, workdir: Path, chief: bool, quiet: bool):
    self.path, self.chief, self.quiet = workdir / 'events.jsonl', chief, quiet
    self.counts = dict.fromkeys(_COUNTED, 0)
    self.first_loss: float | None = None
    self.diverges = False

  def add(self, kind: str, step: int, words: str, tell: bool = True, **more: Any) -> None:
    if not self.chief:
      return
    row = {'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'kind': kind, 'step': step, 'words': words, **more}
    files.append_lines(self.path, [jsonfile.dumps(row)])
    if tell and not self.quiet:
      tqdm.write(f'{kind}: {words}', file=sys.stderr)  # above a progress bar, if there is one

  def look_at(self, rows: Sequence[dict[str, Any]]) -> None:
    """Warns once that the run diverges, when a loss is far above that of the first step."""
    for row in rows:
      if self.first_loss is None:
        before = read_rows(self.path.with_name('metrics.jsonl')) if self.chief else []
        self.first_loss = next(
          (r['loss'] for r in (*before, row) if isinstance(r.get('loss'), int | float)), row['loss']
        )
      grown = row['loss'] - self.first_loss
      if grown > _DIVERGES * abs(self.first_loss) > 0 and not self.diverges:
        self.diverges = True
        words = f'the loss is {row["loss"]:.4g} at step {row["step"]}, {self.first_loss:.4g} at first: the run diverges'
        self.add('warning', row['step'], f'{words}; lower the learning rate or raise the damping')

  def count(self, row: dict[str, Any]) -> None:
    """Warns when a counter in the optimiser's state has grown."""
    for name, words in _COUNTED.items():
      now = row.get(name, 0)
      if now > self.counts[name]:
        self.add('warning', row['step'], f'by step {row["step"]}: {now:.0f} {words}', count=now)
      self.counts[name] = max(now, self.counts[name])
