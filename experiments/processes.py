"""Runs of several processes: how they find each other, and how all stop when one does."""

from __future__ import annotations

import contextlib
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

from experiments import jsonfile
from experiments.errors import STOPPED, ConfigError

_ADDRESS = flags.DEFINE_string('coordinator_address', None, 'host:port of process 0, to join processes by hand.')
_COUNT = flags.DEFINE_integer('num_processes', None, 'How many processes there are, with --coordinator_address.')
_NUMBER = flags.DEFINE_integer('process_id', None, 'The number of this process, from 0, with --coordinator_address.')
# While training the watchdog is faster than the runtime's heartbeat, and says which process it was.
# A job that is stopped as a whole and continued later keeps no heartbeat meanwhile.
_TIMES = {'heartbeat_timeout_seconds': 300, 'shutdown_timeout_seconds': 10}
# Seconds for all to come. Launchers end the others of one that dies; large jobs take their time to start.
_BY_HAND, _LAUNCHED = 40, 300
_NUMBERS = itertools.count()  # of what processes have told each other: keys of the runtime's store are written once
_ALONE = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')  # what the runtime says of this process itself
_STATUS = re.compile('(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ')


def join() -> None:
  """Joins the other processes, if there are any: by flags, or as Open MPI or Slurm started them.

  Must come before anything computes.

  Raises:
    ConfigError: some flags are missing, or the others do not answer.
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
    _initialize({})  # which finds both by itself


def _initialize(how: dict[str, Any]) -> None:
  faulthandler.disable()  # else stacks of all threads bury what the runtime says when it has lost process 0
  where, limit = how.get('coordinator_address', 'the address that the launcher gave'), _BY_HAND if how else _LAUNCHED
  # The runtime's own limit aborts with a stack.
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
  """Where process 0 listens: at the address that was given, where that is one of this machine's.

  The runtime would listen at all of them. Behind a service or a translated address there is no other way, which is told.
  """
  if how.get('process_id') != 0:
    return {}
  host = how['coordinator_address'].rpartition(':')[0].strip('[]')
  try:
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
      probe.bind(address)
  except OSError as error:
    logging.warning('%s is no address of this machine (%s): process 0 listens at all of them', host, error.strerror)
    return {}
  return {'coordinator_bind_address': how['coordinator_address']}


def _give_up(words: str) -> None:
  print(f'error: {words}; see what the others say', file=sys.stderr, flush=True)
  os._exit(STOPPED)


def several() -> bool:
  return jax.process_count() > 1


def chief() -> bool:
  """Whether this process writes what all share."""
  return jax.process_index() == 0


def agree(value: bool) -> bool:
  """The chief's value, on all."""
  if not several():
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def shared_name() -> str:
  """Returns a random name that all processes of this job get, and no other job."""
  return _told(f'name/{next(_NUMBERS)}', secrets.token_hex(8) if chief() else None)


def require_alike(what: str, values: dict[str, Any]) -> None:
  """Compares what all processes say of something; to be called by all in the same order. Needs no devices.

  Args:
    what: a name for the comparison.
    values: by name; anything that JSON holds.

  Raises:
    ConfigError: a process has other values than process 0; the message names it, and the first such value.
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
  """Has process 0 wait until the others know why all end: the runtime aborts those that it leads where it is gone."""
  if not chief():
    _client().key_value_set(f'kronmesh/{key}/known/{jax.process_index()}', '')
    return
  for number in range(1, jax.process_count()):
    with contextlib.suppress(ConfigError):
      _read(f'{key}/known/{number}', seconds=10)
  time.sleep(1)  # to say it


def _difference(key: str) -> str:
  """The first difference between the processes in words; '' where there is none."""
  found = [jsonfile.loads(_read(f'{key}/{number}')) for number in range(jax.process_count())]
  for number, values in enumerate(found):
    for name in sorted(found[0].keys() | values.keys()):
      ours, theirs = found[0].get(name), values.get(name)
      if ours != theirs:
        return (
          f'process {number} has {name}={theirs!r} where process 0 has {ours!r}; start all processes with the same '
          'settings, code and data'
        )
  return ''


def _told(key: str, value: str | None) -> str:
  """The chief's value, on all, without any device."""
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
  from orbax.checkpoint import multihost  # JAX itself has no public name for the store that its processes share

  return multihost.get_jax_distributed_client()


@contextlib.contextmanager
def chief_first() -> Iterator[None]:
  """What is inside is done by the chief, and then by the others, who find what it has made."""
  if several():
    agree(True)  # who is connected can wait for hours, who is not for half a minute
  if several() and not chief():
    agree(True)
  yield
  if several() and chief():
    agree(True)


def any_of(value: bool) -> bool:
  """Whether it is so on any process; to be called by all."""
  if not several():
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def stop(message: str, code: int) -> None:
  """Ends this process at once, so that the others notice; an orderly end would wait for them."""
  print(f'error: process {jax.process_index()}: {message}', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def is_lost(error: BaseException | None) -> bool:
  """Whether the runtime raised it, or what caused it: a save that waits for the others says only how long it waited."""
  if error is None:
    return False
  # Arrays that are fetched raise a ValueError with the runtime's status as its text.
  own = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
  if own and str(error).startswith(_ALONE):
    return False
  return bool(own) or is_lost(error.__cause__)


def lost(error: Exception) -> str:
  """What to say of an error of the runtime while there are other processes."""
  return f'another process stopped, or the network to it ({_first_line(error)}); its own message says why'


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:160]
