"""K-FAC's state by parameter name, without stacks or padding: the form that checkpoints hold.

How factors are stacked depends on the number of owners, and so on the mesh; their logical form does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .curvature import Curvature
from .precondition import ScaleByKfacState
from .stacks import Layout, lay_out

_FIELDS = ('factors', 'weights', 'inverses')


def _key(block: str) -> str:
  return block.replace('/', '.')


def _map_states(fn: Any, state: Any) -> Any:
  is_state = lambda x: isinstance(x, ScaleByKfacState)  # noqa: E731
  return jax.tree.map(lambda x: fn(x) if is_state(x) else x, state, is_leaf=is_state)


def to_logical(state: Any, curvature: Curvature) -> Any:
  """An optax state whose K-FAC stacks are replaced by dictionaries block -> factor -> (slots, ...).

  Args:
    state: an optax state of arrays.
    curvature: the one the optimiser was made with.
  """

  def convert(kfac: ScaleByKfacState) -> ScaleByKfacState:
    owners = next(iter(kfac.factors.values())).shape[0]
    layout = lay_out(curvature.blocks, owners)
    fields = {}
    for field in _FIELDS:
      stacks = getattr(kfac, field)
      fields[field] = {
        _key(b.name): {f: layout.read(stacks, b.name, f) for f in b.operator.factors} for b in curvature.blocks
      }
    return kfac._replace(**fields)

  return _map_states(convert, state)


def from_logical(state: Any, curvature: Curvature, owners: int = 1) -> Any:
  """The inverse of `to_logical`, for any number of owners."""
  layout = lay_out(curvature.blocks, owners)

  def convert(kfac: ScaleByKfacState) -> ScaleByKfacState:
    return kfac._replace(**{field: _stack(layout, getattr(kfac, field), field) for field in _FIELDS})

  return _map_states(convert, state)


def _stack(layout: Layout, values: Any, field: str) -> Any:
  by_block: dict[str, dict[str, Any]] = {}
  for block, factor in layout.places:
    by_block.setdefault(block, {})[factor] = values[_key(block)][factor]
  stacks = layout.gather(by_block)
  if field == 'inverses':  # padding slots hold identities, as they do in a new state
    for stack, used in layout.used().items():
      stacks[stack] = jnp.where(used[..., None, None], stacks[stack], jnp.eye(stacks[stack].shape[-1]))
  return stacks
