"""Gradients reduced by the collectives of the record runs, instead of those that XLA chooses.

The loss and its gradient are then computed shard by shard (`jax.shard_map`), as in those runs: batch normalisation sees
the examples of one shard, and running averages are means over the shards. This module decides only what is summed, and
how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .. import kron, parallel
from ..parallel.collectives import METHODS, all_reduce_tree
from .errors import ConfigError


def check(config: Any, mesh: Mesh) -> bool:
  """Returns whether `config.gradients` asks for one of our collectives.

  Raises:
    ConfigError: the collective is unknown, or it cannot run on this mesh.
  """
  settings = config.gradients
  if settings.all_reduce == 'auto':
    if settings.half:
      raise ConfigError(
        f"config.gradients.half={settings.half!r}: choose config.gradients.all_reduce too; auto is XLA's own"
      )
    return False
  if settings.all_reduce not in METHODS:
    raise ConfigError(
      f'config.gradients.all_reduce={settings.all_reduce!r} is unknown; choose from auto, {", ".join(METHODS)}'
    )
  if settings.half not in ('', 'bfloat16', 'float16'):
    raise ConfigError(f"config.gradients.half={settings.half!r} is unknown; choose '', 'bfloat16' or 'float16'")
  if set(mesh.axis_names) - set(parallel.BATCH):
    raise ConfigError(
      f'config.gradients.all_reduce={settings.all_reduce!r} is for meshes of data and fsdp; got {config.mesh!r}'
    )
  if settings.all_reduce in ('hierarchical', 'torus') and len(mesh.axis_names) < 2:
    raise ConfigError(
      f'config.gradients.all_reduce={settings.all_reduce!r} runs along two mesh axes: --config.mesh=data=4,fsdp=2'
    )
  return True


def by_shard(fn: Callable, config: Any, mesh: Mesh) -> Callable:
  """Returns a function that runs `fn` on each shard of the batch; call it under jit.

  fn: (params, model state, batch, key) -> ((loss, aux), gradients, statistics).

  Losses, auxiliary outputs and gradients become means over the shards; statistics get a leading axis of shards.
  """
  settings, axes = config.gradients, tuple(mesh.axis_names)
  half = jnp.dtype(settings.half) if settings.half else None

  def local(params: Any, model_state: Any, batch: Any, key: jax.Array) -> tuple:
    key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    value, grads, stats = fn(params, model_state, batch, key)
    grads = all_reduce_tree(grads, axes, settings.all_reduce, half, int(settings.bucket_mb * 2**20))
    value, grads = jax.lax.pmean(value, axes), jax.tree.map(lambda g: g / mesh.size, grads)
    if stats is None:
      return value, grads, ({}, {}, jnp.zeros(()))
    uses, examples = jax.lax.psum((stats.uses, stats.examples), axes)
    return value, grads, (jax.tree.map(lambda s: s[None], stats.sums), uses, examples)

  whole, shards = PartitionSpec(), PartitionSpec(axes)

  def run(params: Any, model_state: Any, batch: Any, key: jax.Array) -> tuple:
    out = (whole, whole, (shards, whole, whole))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, shards, whole), out_specs=out, check_vma=False)
    value, grads, stats = mapped(params, model_state, batch, key)
    return value, grads, kron.Statistics(*stats) if stats[0] else None

  return run
