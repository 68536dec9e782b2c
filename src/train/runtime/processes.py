"""Runs of several processes: how the processes find each other, and how all stop when one does."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import itertools
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from .. import jsonfile
from ..errors import STOPPED, ConfigError

_ADDRESS = flags.DEFINE_string('coordinator_address', None, 'host:port of process 0, to join processes by hand.')
_COUNT = flags.DEFINE_integer('num_processes', None, 'How many processes there are, with --coordinator_address.')
_NUMBER = flags.DEFINE_integer('process_id', None, 'The number of this process, from 0, with --coordinator_address.')
# While training, the watchdog is faster than the runtime's heartbeat and says which process failed. The heartbeat
# timeout is long because a job that is paused as a whole and continued later sends no heartbeats meanwhile.
_TIMES = {'heartbeat_timeout_seconds': 300, 'shutdown_timeout_seconds': 10}
# Seconds for all processes to connect. Large jobs start slowly, and if one process dies, a launcher ends the others.
_BY_HAND, _LAUNCHED = 40, 300
_NUMBERS = itertools.count()  # of exchanges, because a key of the runtime's store is written only once
_ALONE = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')  # statuses about this process itself
_STATUS = re.compile('(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ')


def are_asked_for() -> bool:
  """Checks whether the flags or the launcher make this process one of several."""
  launched = max(int(os.environ.get(name, 1)) for name in ('OMPI_COMM_WORLD_SIZE', 'SLURM_STEP_NUM_TASKS'))
  return launched > 1 or _ADDRESS.value is not None


def join() -> None:
  """Joins the other processes, if flags, Open MPI or Slurm say that there are any.

  Call it before anything computes.

  Raises:
    ConfigError: some flags are missing, or the other processes do not answer.
  """
  given = {'coordinator_address': _ADDRESS.value, 'num_processes': _COUNT.value, 'process_id': _NUMBER.value}
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if not missing:
    if not 0 <= given['process_id'] < given['num_processes']:
      raise ConfigError(
        f'--process_id={given["process_id"]} must lie between 0 and --num_processes={given["num_processes"]}'
      )
    _initialize(given)
  elif len(missing) < len(given):
    raise ConfigError(f'{" and ".join(missing)} must be given too, to join processes by hand')
  elif int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1 or int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
    _initialize({})  # JAX asks the launcher


def _initialize(how: dict[str, Any]) -> None:
  faulthandler.disable()  # otherwise thread stacks bury the runtime's message that it lost process 0
  where, limit = how.get('coordinator_address', 'the address that the launcher gave'), _BY_HAND if how else _LAUNCHED
  # This limit comes first, because the runtime's limit aborts with a stack trace.
  timer = threading.Timer(limit, _give_up, (f'not all processes came to {where} within {limit} seconds',))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(**how, **_binding(how), **_TIMES, initialization_timeout=2 * limit)
  except Exception as error:
    raise ConfigError(f'the processes did not find each other at {where}: {_first_line(error)}') from error
  finally:
    timer.cancel()


def _binding(how: dict[str, Any]) -> dict[str, str]:
  """Returns the argument that has process 0 listen only at the given address, if it is one of this machine's.

  By default the runtime listens at all addresses. Behind a service or a translated address this is unavoidable, and a
  warning says so.
  """
  if how.get('process_id') != 0:
    return {}
  host, _, port = how['coordinator_address'].rpartition(':')
  try:
    family, kind, _, _, address = socket.getaddrinfo(host.strip('[]'), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port released just now counts as free
      probe.bind(address)
  except OSError as error:
    if error.errno == errno.EADDRINUSE:  # the runtime would share the port and end the job that uses it
      raise ConfigError(
        f'{how["coordinator_address"]} is in use, perhaps by another job; choose another port for --coordinator_address'
      ) from error
    logging.warning('%s is not an address of this machine (%s): process 0 listens at all of them', host, error.strerror)
    return {}
  return {'coordinator_bind_address': how['coordinator_address']}


def _give_up(words: str) -> None:
  print(f'error: {words}; see what the others say', file=sys.stderr, flush=True)
  os._exit(STOPPED)


def several() -> bool:
  return jax.process_count() > 1


def chief() -> bool:
  """Checks whether this process is process 0, which writes the shared files."""
  return jax.process_index() == 0


def agree(value: bool) -> bool:
  """Returns the chief's value on all processes."""
  if not several():
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def shared_name() -> str:
  """Returns a random name that all processes of this job share and that no other job has."""
  return _told(f'name/{next(_NUMBERS)}', secrets.token_hex(8) if chief() else None)


def require_alike(what: str, values: dict[str, Any]) -> None:
  """Raises ConfigError unless all processes pass the same values.

  All processes must call it, in the same order. It needs no devices.

  Args:
    what: a name for the comparison.
    values: values by name, which JSON can hold.

  Raises:
    ConfigError: a process has other values than process 0. The message names the process and the first such value.
  """
  if not several():
    return
  key = f'{what}/{next(_NUMBERS)}'
  _client().key_value_set(f'kronmesh/{key}/{jax.process_index()}', jsonfile.dumps(values, sort_keys=True))
  verdict = _told(f'{key}/verdict', _difference(key) if chief() else None)
  if verdict:
    _take_leave(key)
    raise ConfigError(verdict)


def _take_leave(key: str) -> None:
  """Has process 0 wait until the others know why all end, since the runtime aborts them once process 0 is gone."""
  if not chief():
    _client().key_value_set(f'kronmesh/{key}/known/{jax.process_index()}', '')
    return
  for number in range(1, jax.process_count()):
    with contextlib.suppress(ConfigError):
      _read(f'{key}/known/{number}', seconds=10)
  time.sleep(1)  # for the others to print it


def _difference(key: str) -> str:
  """Describes the first difference between the processes' values, or returns '' if there is none."""
  answers = [jsonfile.loads(_read(f'{key}/{number}')) for number in range(jax.process_count())]
  for number, values in enumerate(answers):
    for name in sorted(answers[0].keys() | values.keys()):
      ours, theirs = answers[0].get(name), values.get(name)
      if ours != theirs:
        return (
          f'process {number} has {name}={theirs!r} where process 0 has {ours!r}; start all processes with the same '
          'settings, code and data'
        )
  return ''


def _told(key: str, value: str | None) -> str:
  """Returns the chief's value on all processes, without using a device."""
  if not several():
    return value or ''
  if value is not None:
    _client().key_value_set(f'kronmesh/{key}', value)
  return _read(key)


def _read(key: str, seconds: int = _LAUNCHED) -> str:
  try:
    return _client().blocking_key_value_get(f'kronmesh/{key}', 1000 * seconds)
  except Exception as error:
    raise ConfigError(
      f'another process did not say its {key.partition("/")[0]} within {seconds} seconds; see what the others say'
    ) from error


def _client() -> Any:
  from orbax.checkpoint import multihost  # JAX has no public name for its processes' shared store

  return multihost.get_jax_distributed_client()


@contextlib.contextmanager
def chief_first() -> Iterator[None]:
  """Has the chief run the body first, and then the others, who find the chief's results."""
  if several():
    agree(True)  # connected processes can wait for hours, others only for half a minute
  if several() and not chief():
    agree(True)
  yield
  if several() and chief():
    agree(True)


def any_of(value: bool) -> bool:
  """Checks whether the value is true on any process. All processes must call it."""
  if not several():
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def stop(message: str, code: int) -> None:
  """Ends this process at once, so that the others notice. An orderly exit would wait for them."""
  print(f'error: process {jax.process_index()}: {message}', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def is_lost(error: BaseException | None) -> bool:
  """Checks whether an error or one of its causes means that another process was lost.

  The causes matter because a save that waits for the others says only how long it waited.
  """
  if error is None:
    return False
  # Fetching an array raises a ValueError whose text is the runtime's status.
  of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
  if of_runtime and str(error).startswith(_ALONE):
    return False
  return bool(of_runtime) or is_lost(error.__cause__)


def lost(error: Exception) -> str:
  """Returns the message for a runtime error that means that another process was lost."""
  return f'another process stopped, or the network to it ({_first_line(error)}); its own message says why'


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:160]
