"""A run that begins with the trained values of another one (`config.start`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import kron
from .checkpoints import load_export
from .errors import ConfigError
from .run import Run
from .steps import TrainState


def new_state(run: Run) -> TrainState:
  """Makes the state in which a run begins: drawn by its seed, or with what the run `config.start` learned.

  Of that run come the parameters, and the numbers and masks of the model's state. Steps are counted anew, and the
  optimiser begins anew.

  Raises:
    ConfigError: that run has no export, or a parameter of another name or shape.
  """
  state = run.init(run.config.seed)
  if not run.config.start:
    return state
  variables, _ = load_export(run.config.start)
  params = variables.pop('params')
  names = kron.param_names(state.params)
  theirs = dict(zip(kron.param_names(params), jax.tree.leaves(params), strict=True))
  for name, leaf in zip(names, jax.tree.leaves(state.params), strict=True):
    if name not in theirs:
      raise ConfigError(f'config.start={run.config.start!r} has no parameter {name!r}; its network is another one')
    if theirs[name].shape != leaf.shape:
      raise ConfigError(
        f'config.start={run.config.start!r}: {name!r} has the shape {theirs[name].shape}, not {leaf.shape}; '
        'its network is another one'
      )
  leaves = [_like(theirs[name], leaf) for name, leaf in zip(names, jax.tree.leaves(state.params), strict=True)]
  params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
  known = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(variables)[0]}

  def taken(path: Any, leaf: jax.Array) -> jax.Array:
    x = known.get(jax.tree_util.keystr(path))
    counts = jnp.issubdtype(leaf.dtype, jnp.integer)
    return leaf if x is None or counts or x.shape != leaf.shape else _like(x, leaf)

  model_state = jax.tree_util.tree_map_with_path(taken, state.model_state)
  average = jax.tree.map(jnp.copy, params) if state.average else state.average
  return state._replace(params=params, model_state=model_state, average=average)


def _like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
  return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda place: value[place].astype(leaf.dtype))
