"""Constants in a model's state, such as a graph: they are sharded like a batch, and no checkpoint holds them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

from .. import parallel

COLLECTION = 'graph'  # the name of the collection in the model's state


def shardings(model_state: Any, mesh: Any) -> Any:
  """Returns the shardings of a model's state.

  The parts of a graph are divided like a batch; everything else is replicated.
  """
  parts = parallel.batch_shards(mesh)

  def one(path: Any, x: Any) -> NamedSharding:
    keys = [k.key for k in path]
    apart = keys[0] == COLLECTION and keys[-1] not in ('part', 'place') and parts > 1 and x.shape[0] == parts
    return parallel.batch_sharding(mesh, parts) if apart else parallel.replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, model_state)
