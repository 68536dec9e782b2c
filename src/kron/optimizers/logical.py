"""K-FAC's state by parameter name, without stacks or padding, as checkpoints hold it.

The stacks of factors depend on the number of owners, and so on the mesh; the logical form does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..blocks.block import key_of
from ..state.stacks import Stacked


def to_logical(state: Any) -> Any:
  """Replaces every `Stacked` in an optax state by dictionaries, the form in which checkpoints hold the factors.

  It does not depend on the number of owners, and so not on the mesh. `from_logical` reverses it.

  Args:
    state: an optax state, or any pytree.

  Returns:
    The same tree with block -> factor -> array in place of each `Stacked`: (slots, n, n) for matrices, (slots,) for
    numbers, without padding. Block names have '.' in place of '/'.
  """

  def convert(x: Any) -> Any:
    return {key_of(block): matrices for block, matrices in x.by_block().items()} if isinstance(x, Stacked) else x

  return jax.tree.map(convert, state, is_leaf=_is_stacked)


def from_logical(logical: Any, like: Any) -> Any:
  """Converts a logical state back to stacks, for any number of owners; the inverse of `to_logical`.

  Args:
    logical: a result of `to_logical`.
    like: the state of the optimiser that will continue, or its shapes (`jax.eval_shape(tx.init, params)`).

  Returns:
    A state with the structure and layout of `like` and the values of `logical`.
  """
  return jax.tree.map(
    lambda template, x: _stacked(template, x) if isinstance(template, Stacked) else x,
    like,
    logical,
    is_leaf=_is_stacked,
  )


def _is_stacked(x: Any) -> bool:
  return isinstance(x, Stacked)


def _stacked(like: Stacked, values: Mapping[str, Mapping[str, Array]]) -> Stacked:
  layout = like.layout
  by_block = {block: values[key_of(block)] for block, _ in layout.places}
  if next(iter(like.values())).ndim == 2:
    return like.filled(layout.gather_numbers(by_block))
  joined = layout.joined(by_block)
  padded = layout.padded(joined)
  if not like.held:
    return like.filled(padded)
  # Held inverses are padded with identities, as in a new state.
  result = {}
  for name, stack in layout.stacks.items():
    used = (layout.wholes[name] > 0)[..., None, None]
    result[name] = joined[name] if stack.shared else jnp.where(used, padded[name], stack.identities())
  return like.filled(result)
