"""K-FAC's state by parameter name, without stacks or padding: the form that checkpoints hold.

How factors are stacked depends on the number of owners, and so on the mesh; their logical form does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .block import key_of
from .curvature import Curvature
from .dealing import lay_out
from .placing import Placement
from .precondition import layout_of
from .stacks import Layout

_HELD = (
  'inverses',
  'vectors',
)  # fields of what is held by all or by groups; their padding is identities, as in a new state


def to_logical(state: Any, curvature: Curvature, placement: Placement | None = None) -> Any:
  """An optax state whose stacks are replaced by dictionaries block -> factor -> (slots, ...).

  Args:
    state: an optax state of arrays.
    curvature, placement: those the optimiser was made with.
  """
  sizes = {f'n{f.n}' for b in curvature.blocks for f in b.operator.factors.values()}

  def is_stacks(x: Any) -> bool:
    return isinstance(x, dict) and bool(x) and all(isinstance(k, str) and k.split('_')[0] in sizes for k in x)

  def convert(x: Any) -> Any:
    if not is_stacks(x):
      return x
    layout = layout_of(x, curvature, placement)
    return {key_of(b.name): {f: layout.read(x, b.name, f) for f in b.operator.factors} for b in curvature.blocks}

  return jax.tree.map(convert, state, is_leaf=is_stacks)


def from_logical(state: Any, curvature: Curvature, like: Any = None, placement: Placement | None = None) -> Any:
  """The inverse of `to_logical`, for any number of owners.

  Args:
    state: what `to_logical` returned.
    curvature, placement: those of the optimiser that is to go on.
    like: its state, or the shapes of that (`jax.eval_shape(tx.init, params)`); None for one owner.
  """
  names = {key_of(b.name): set(b.operator.factors) for b in curvature.blocks}

  def is_logical(x: Any) -> bool:
    return (
      isinstance(x, dict)
      and set(x) == set(names)
      and all(isinstance(v, dict) and set(v) == names[k] for k, v in x.items())
    )

  def convert(path: tuple, x: Any, *like: Any) -> Any:
    if not is_logical(x):
      return x
    layout = layout_of(like[0], curvature, placement) if like else lay_out(curvature.blocks)
    return _stack(layout, x, getattr(path[-1], 'name', ''))

  return jax.tree_util.tree_map_with_path(convert, state, *([] if like is None else [like]), is_leaf=is_logical)


def _stack(layout: Layout, values: Any, field: str) -> Any:
  by_block = {block: values[key_of(block)] for block, _ in layout.places}
  first = next(iter(next(iter(by_block.values())).values()))
  if first.ndim == 1:
    return layout.gather_numbers(by_block)
  joined = layout.joined(by_block)
  padded = layout.padded(joined)
  if field not in _HELD:
    return padded
  result = {}
  for name, stack in layout.stacks.items():
    used = (layout.wholes[name] > 0)[..., None, None]
    result[name] = joined[name] if stack.shared else jnp.where(used, padded[name], stack.identities())
  return result
