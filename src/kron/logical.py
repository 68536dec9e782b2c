"""K-FAC's state by parameter name, without stacks or padding: the form that checkpoints hold.

How factors are stacked depends on the number of owners, and so on the mesh; their logical form does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .curvature import Curvature
from .stacks import Layout, lay_out

_WITH_IDENTITIES = ('inverses', 'vectors')  # in these fields padding slots hold identities, as they do in a new state


def key_of(block: str) -> str:
  """A block's name as checkpoints write it."""
  return block.replace('/', '.')


def to_logical(state: Any, curvature: Curvature) -> Any:
  """An optax state whose stacks are replaced by dictionaries block -> factor -> (slots, ...).

  Args:
    state: an optax state of arrays.
    curvature: the one the optimiser was made with.
  """
  names = set(lay_out(curvature.blocks).shapes)
  is_stacks = lambda x: isinstance(x, dict) and set(x) == names  # noqa: E731

  def convert(x: Any) -> Any:
    if not is_stacks(x):
      return x
    layout = lay_out(curvature.blocks, next(iter(x.values())).shape[0])
    return {key_of(b.name): {f: layout.read(x, b.name, f) for f in b.operator.factors} for b in curvature.blocks}

  return jax.tree.map(convert, state, is_leaf=is_stacks)


def from_logical(state: Any, curvature: Curvature, owners: int = 1) -> Any:
  """The inverse of `to_logical`, for any number of owners."""
  layout = lay_out(curvature.blocks, owners)
  names = {key_of(b.name): set(b.operator.factors) for b in curvature.blocks}

  def is_logical(x: Any) -> bool:
    return (
      isinstance(x, dict)
      and set(x) == set(names)
      and all(isinstance(v, dict) and set(v) == names[k] for k, v in x.items())
    )

  def convert(path: tuple, x: Any) -> Any:
    return _stack(layout, x, getattr(path[-1], 'name', '')) if is_logical(x) else x

  return jax.tree_util.tree_map_with_path(convert, state, is_leaf=is_logical)


def _stack(layout: Layout, values: Any, field: str) -> Any:
  by_block: dict[str, dict[str, Any]] = {}
  for block, factor in layout.places:
    by_block.setdefault(block, {})[factor] = values[key_of(block)][factor]
  stacks = layout.gather(by_block)
  if field in _WITH_IDENTITIES:
    for stack, used in layout.used().items():
      stacks[stack] = jnp.where(used[..., None, None], stacks[stack], jnp.eye(stacks[stack].shape[-1]))
  return stacks
