"""Sweeps: the members of one, and their training by processes of this machine or by jobs of Slurm."""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..runtime.launch import launch_flags  # isort: skip  (sets the environment before JAX loads)

from ... import files
from .. import jsonfile
from ..errors import AGAIN, ConfigError
from ..runtime.starting import WITH_PARENT
from ..runtime.workdir import as_json
from ..settings.configfile import config_functions, config_path, fresh_config
from ..settings.overrides import Overrides, check_different, differences, flags_of, names_of, parse_sweep, resolved
from .comparison import Known, Member, write_comparison


def members_of(config: Any, workdir: Path, sweep: str | None) -> list[Member]:
  """Returns the members that the value of --sweep names, or, without one, those of the config file's `sweep()`."""
  if sweep is not None:
    combinations = parse_sweep(sweep, config)
  else:
    sweep_of_config = config_functions().get('sweep')
    if sweep_of_config is None:
      raise ConfigError(f'{config_path()} has no sweep(); write --sweep=seed=0..4')
    combinations = [resolved(overrides, config) for overrides in yielded(sweep_of_config)]
  check_different(combinations, config)
  return [
    Member(name, o, str(workdir / 'members' / name))
    for name, o in zip(names_of(combinations), combinations, strict=True)
  ]


def yielded(sweep: Callable[[], Any]) -> list[Overrides]:
  """Returns the overrides that a config file's sweep() yields.

  Raises:
    ConfigError: it yields nothing, or something other than overrides.
  """
  entries = sweep()
  if isinstance(entries, dict) or not isinstance(entries, Iterable):
    raise ConfigError(
      f'sweep() of {config_path()} returns {type(entries).__name__}; let it yield a dict for each member'
    )
  entries = list(entries)
  odd = next(
    (entry for entry in entries if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry)), None
  )
  if odd is not None:
    raise ConfigError(f'sweep() of {config_path()} yields {odd!r}, not a dict of settings by their keys')
  if not entries:
    raise ConfigError(f'sweep() of {config_path()} yields nothing')
  return entries


def member_command(member: Member, config: Any) -> list[str]:
  """Returns the command that trains a member with the sweep's config and the member's settings."""
  return [
    sys.executable, '-P', '-m', 'kronmesh', 'train', f'--config={config_path()}',
    *flags_of(differences(config, fresh_config())), *flags_of(member.overrides), f'--workdir={member.workdir}',
    *launch_flags(),
  ]  # fmt: skip


class Job:
  """A member's process, started here or by submitit. A preempted job is resubmitted and goes on from its checkpoint."""

  def __init__(self, command: list[str], log: str):
    self.command, self.log, self.folder = command, log, os.getcwd()

  def __call__(self, started: Callable[[subprocess.Popen], None] = lambda p: None, **environment: str) -> int:
    Path(self.log).parent.mkdir(parents=True, exist_ok=True)
    with open(self.log, 'ab') as log:
      env = {**os.environ, **environment, WITH_PARENT: str(os.getpid())}
      # The process gets a new session, so that a terminal's Ctrl-C does not reach it: we pass it on as a signal on
      # which the process saves. It runs in the caller's folder, to which paths in the config are relative.
      process = subprocess.Popen(
        self.command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
      )
      started(process)
      return process.wait()

  def checkpoint(self) -> Any:
    import submitit

    return submitit.helpers.DelayedSubmission(self)


class Sweep:
  """The members of a sweep and their states, written to `sweep.json` whenever a state changes."""

  def __init__(self, config: Any, workdir: Path, members: list[Member]):
    self.config, self.workdir, self.lock = config, workdir, threading.Lock()
    self.path = workdir / 'sweep.json'
    self.known, self.page_after = Known(), 0.0
    before = self._before()
    same = before.get('config') == as_json(config)  # if not, each member goes on or says what differs
    states = {m['name']: m for m in before['members']} if same else {}
    self.members = {m.name: m for m in members}
    for member in members:
      old = states.get(member.name, {})
      ended = (Path(member.workdir) / 'export').is_dir() and (Path(member.workdir) / 'metrics.jsonl').is_file()
      if ended and old.get('state') == 'done' and old['overrides'] == json.loads(jsonfile.dumps(member.overrides)):
        self.members[member.name] = member._replace(state='done')

  def _before(self) -> dict[str, Any]:
    """Reads the `sweep.json` of an earlier call; {} if it cannot be read."""
    if not self.path.exists():
      return {}
    try:
      stored = jsonfile.read(self.path)
      if all({'name', 'state', 'overrides'} <= m.keys() for m in stored['members']):
        return stored
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
      pass
    print(f'{self.path} cannot be read: all members are started again, and go on from what they have', file=sys.stderr)
    return {}

  def waiting(self) -> list[Member]:
    return [member for member in self.members.values() if member.state == 'waits']

  def mark(self, member: Member, state: str, words: str = '') -> None:
    with self.lock:
      self.members[member.name] = member._replace(state=state, words=words)
      rows = [m._asdict() for m in self.members.values()]
      files.write(self.path, jsonfile.dumps({'config': as_json(self.config), 'members': rows}, indent=1))
      ended = [m for m in self.members.values() if m.state not in ('waits', 'runs')]
      if state == 'runs':
        print(f'{member.name}: starts', flush=True)
      else:
        self._compare()
        print(f'{len(ended)}/{len(self.members)} {member.name}: {state}{": " if words else ""}{words}', flush=True)

  def _compare(self) -> None:
    """Rewrites the table and the page, for at most a tenth of the time, since many members may end at once."""
    start = time.monotonic()
    if start > self.page_after:
      write_comparison(self.workdir, self.config, list(self.members.values()), self.known)
      end = time.monotonic()
      self.page_after = end + 9 * (end - start)

  def finish(self) -> str:
    """Writes the table and the page of all members, and returns the table."""
    return write_comparison(self.workdir, self.config, list(self.members.values()), self.known)

  def ended(self, member: Member, code: int) -> None:
    if code == 0:
      self.mark(member, 'done')
    elif code in (AGAIN, -signal.SIGTERM):
      self.mark(member, 'stopped', 'the same command goes on')
    else:
      self.mark(member, 'failed', last_error(self.log(member), code))

  def log(self, member: Member) -> Path:
    return self.workdir / 'logs' / f'{member.name}.log'


def last_error(log: Path, code: int) -> str:
  """Returns the last error line of a log, or else its last line, with the exit code."""
  lines = log.read_text(errors='replace').splitlines() if log.exists() else []
  errors = [line for line in lines if line.startswith('error: ')] or lines[-1:] or ['']
  return f'{errors[-1].removeprefix("error: ")[:300]} (exit code {code})'


def run_here(sweep: Sweep, workers: int, gpus: list[str]) -> None:
  """Trains the members with `workers` processes at a time. If interrupted, it tells all to save and stop."""
  running: set[subprocess.Popen] = set()
  free: queue.Queue[str | None] = queue.Queue()
  for worker in range(workers):
    free.put(gpus[worker] if gpus else None)
  stopping = threading.Event()

  def started(process: subprocess.Popen) -> None:
    running.add(process)
    if stopping.is_set():  # the stop came while it started
      process.send_signal(signal.SIGTERM)

  def one(member: Member) -> None:
    gpu = free.get()
    try:
      if not stopping.is_set():
        sweep.mark(member, 'runs')
        environment = {} if gpu is None else {'CUDA_VISIBLE_DEVICES': gpu}
        code = Job(member_command(member, sweep.config), str(sweep.log(member)))(started, **environment)
        sweep.ended(member, code)
    finally:
      free.put(gpu)

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    try:
      for future in [pool.submit(one, member) for member in sweep.waiting()]:
        future.result()
    except BaseException:
      stopping.set()
      for process in list(running):
        if process.poll() is None:
          process.send_signal(signal.SIGTERM)
      raise


def run_on_cluster(sweep: Sweep, cluster: str, parameters: list[str]) -> None:
  """Submits one job for each member with submitit, and waits for them.

  Raises:
    ConfigError: submitit is not installed, or does not know a parameter.
  """
  try:
    import submitit
  except ImportError as error:
    raise ConfigError('--cluster needs the package submitit: pip install submitit') from error
  pairs = dict(p.split('=', 1) if '=' in p else (p, 'True') for p in parameters)
  typed = {k: int(v) if v.isascii() and v.isdigit() else v for k, v in pairs.items()}
  try:
    executor = submitit.AutoExecutor(folder=sweep.workdir / 'submitit', cluster=cluster)
    executor.update_parameters(name='kronmesh', **typed)
  except (NameError, RuntimeError, TypeError) as error:
    raise ConfigError(f'--cluster={cluster}: {" ".join(str(error).split())[:300]}') from error
  waiting = sweep.waiting()
  with executor.batch():
    jobs = [executor.submit(Job(member_command(m, sweep.config), str(sweep.log(m)))) for m in waiting]
  by_job = {id(job): member for job, member in zip(jobs, waiting, strict=True)}
  for member in waiting:
    sweep.mark(member, 'runs')
  for job in submitit.helpers.as_completed(jobs, poll_frequency=1):
    member = by_job[id(job)]
    try:
      sweep.ended(member, job.result())
    except Exception as error:
      sweep.mark(member, 'failed', (str(error).splitlines() or [type(error).__name__])[0][:300])


def other_data(members: Sequence[Member]) -> str:
  """Names a member that was trained on other data than an earlier one with the same data section; '' if none was."""
  seen: dict[str, tuple[str, Any]] = {}
  for member in members:
    try:
      known = jsonfile.read(Path(member.workdir) / 'data.json')
      settings = jsonfile.read(Path(member.workdir) / 'config.json')['data']
    except (OSError, ValueError, KeyError, TypeError):
      continue
    first, before = seen.setdefault(jsonfile.dumps(settings, sort_keys=True), (member.name, known))
    changed = next((key for key in known if before.get(key) != known[key]), None)
    if changed is not None:
      return f'{member.name} was trained on other data than {first}: {changed} is another'
  return ''
