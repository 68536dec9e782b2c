"""Checks that a run fits in the memory of its devices, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax

from ..data import free_memory, in_words
from .errors import ConfigError


def check_batch(like: Iterable[jax.ShapeDtypeStruct], config: Any) -> None:
  """Raises ConfigError if a batch of these shapes does not fit in the memory of all processes' machines together."""
  needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in like)
  free = free_memory()
  if free is not None and needed > free * jax.process_count():
    there = f'a batch needs {in_words(needed)} of memory, and {in_words(free)} are free'
    raise ConfigError(f'config.data.batch_size={config.data.batch_size}: {there}; lower it')


def check_state(state: Any, shardings: Any) -> None:
  """Raises ConfigError if the training state does not fit in this process's devices.

  Args:
    state: the shapes of the parameters, the optimiser state and the rest.
    shardings: the sharding of each array of the state.
  """
  here = [d for d in jax.tree.leaves(shardings)[0].mesh.devices.flat if d.process_index == jax.process_index()]
  state_bytes = sum(map(_bytes_on_a_device, jax.tree.leaves(state), jax.tree.leaves(shardings)))
  largest = max(jax.tree.leaves(state), key=lambda x: math.prod(x.shape))
  limits = [(d.memory_stats() or {}).get('bytes_limit') for d in here]
  if all(limits):
    needed, free, where = state_bytes, min(limits), 'each device'
  else:  # the devices of a CPU share its memory
    needed, free, where = state_bytes * len(here), free_memory(), 'this machine'
  if free is not None and needed > free:
    there = f'{in_words(needed)} of memory on {where}, where {in_words(free)} are free'
    raise ConfigError(
      f'the parameters and the state of the optimiser need {there} (the largest array has shape {largest.shape}); make the '
      'model smaller, or share it out by config.mesh'
    )


def _bytes_on_a_device(x: Any, sharding: Any) -> int:
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return 0
  return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
