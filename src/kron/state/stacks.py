"""Stacks, which hold all factors of one size in one array, so that each size takes one batched inverse.

The leading axis of a stack places it on a mesh. A `Layout` says where each matrix is. `dealing.lay_out` makes it from
shapes alone, without devices. Stacks are (owner, slot, n, n). A stack whose factors are split over all owners is
(owner, slot, rows, n), and every owner has some rows of each of its matrices. Padding slots belong to nobody. Inverses
that every device holds are (matrix, n, n), without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from ..blocks.block import Block
from ..errors import CurvatureError


class Stack(NamedTuple):
  """Describes one array that holds all matrices of one size, type and kind.

  The array is (owners, slots, rows, n). Every owner has all n rows of its matrices, or, if `row_sharded`, n / owners
  rows (rounded up) of every matrix.

  Attributes:
    owners: the number of owners.
    slots: the number of slots of each owner; in a row-sharded stack, the number of slots that all owners share.
    count: the number of matrices; the other slots are padding.
    n: the number of rows and columns of a matrix.
    dtype: the type of the numbers.
    row_sharded: whether every owner has some rows of every matrix.
    shared: whether every device holds the inverses, rather than the owner alone.
  """

  owners: int
  slots: int
  count: int
  n: int
  dtype: Any
  row_sharded: bool = False
  shared: bool = True

  @property
  def rows(self) -> int:
    """Returns the number of rows of a matrix that an owner has."""
    return -(-self.n // self.owners) if self.row_sharded else self.n

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.owners, self.slots, self.rows, self.n

  def take(
    self, order: Int[np.ndarray, ' p'] | None, owner: Any, matrices: Float[Array, 'm n n']
  ) -> Float[Array, '1 s r n']:
    """Returns one owner's share of all matrices, (1, slots, rows, n); padding slots hold an arbitrary one.

    Args:
      order: the matrix at each place, as in `Layout.orders`.
      owner: the number of the owner.
      matrices: all matrices, (count, n, n).
    """
    if self.row_sharded:
      return self.put(matrices, None)[owner][None]
    table = np.arange(self.count) if order is None else np.maximum(order, 0)
    return matrices[jnp.asarray(table.reshape(self.owners, self.slots))[owner]][None]

  def put(self, matrices: Float[Array, '*d m q n'], order: Int[np.ndarray, ' p'] | None) -> Float[Array, '*d o s r n']:
    """Puts matrices, or their packed forms, in their places in the stack, and returns (..., owners, slots, rows, n).

    Args:
      matrices: all matrices, (..., count, n, n), or packed ones of another size.
      order: the matrix at each place, as in `Layout.orders`; -1 stands for no matrix, and the place gets zeros.
    """
    lead = matrices.shape[:-3]
    if order is not None and (order < 0).any():
      matrices = jnp.concatenate([matrices, jnp.zeros_like(matrices[..., :1, :, :])], -3)
    if order is not None:
      matrices = jnp.take(matrices, np.where(order < 0, matrices.shape[-3] - 1, order), -3)
    if not self.row_sharded:
      return matrices.reshape(*lead, self.owners, self.slots, *matrices.shape[-2:])
    missing = self.owners * self.rows - self.n
    matrices = jnp.pad(matrices, [(0, 0)] * (matrices.ndim - 2) + [(0, missing), (0, 0)])
    parts = matrices.reshape(*lead, self.slots, self.owners, self.rows, matrices.shape[-1])
    return jnp.moveaxis(parts, -3, -4)

  def matrices(self, stack: Float[Array, 'o s r n']) -> Float[Array, 'm n n']:
    """Returns all slots of the array `stack` as whole matrices."""
    if not self.row_sharded:
      return stack.reshape(-1, self.n, self.n)
    return jnp.moveaxis(stack, 0, 1).reshape(self.slots, -1, self.n)[:, : self.n]

  @property
  def sparse(self) -> bool:
    """Checks whether most slots are padding, so that it is better to send each matrix by itself."""
    return not self.row_sharded and self.owners * self.slots > 2 * self.count

  @property
  def inverses(self) -> tuple[int, ...]:
    """Returns the shape of the inverses as devices hold them."""
    return (self.count, self.n, self.n) if self.shared else self.shape

  def diagonal(self) -> Bool[Array, '*o r n']:
    """Returns a mask of the diagonal, (owners, 1, rows, n) or with fewer axes."""
    rows = jnp.arange(self.rows)[:, None]
    if self.row_sharded:
      rows = rows + self.rows * jnp.arange(self.owners)[:, None, None, None]
    return rows == jnp.arange(self.n)

  def identities(self) -> Float[Array, 'o s r n']:
    return jnp.broadcast_to(self.diagonal(), self.shape).astype(self.dtype)

  def together(self, flags: Bool[Array, 'o s']) -> Bool[Array, 'o s']:
    """Returns for each slot whether the flags of all owners that have a part of it are set.

    Args:
      flags: (owners, slots).
    """
    return jnp.broadcast_to(flags.all(0), flags.shape) if self.row_sharded else flags


class Layout(NamedTuple):
  """Says where each matrix is in the stacks; `lay_out` makes it.

  A whole matrix is one matrix of a factor's slot. It may be kept as several parts along its diagonal, each in a slot of
  a stack. Whole matrices are numbered from 1 over all stacks.

  Attributes:
    stacks: by name.
    places: (block, factor) -> (stack, the position of each of its matrices among the slots of all owners).
    orders: stack -> the number of the matrix at each position, counted over the stack's factors in the order of
      `places`; -1 for padding; None if the matrices are in order.
    wholes: stack -> (owners, slots), the number of the whole matrix that each slot holds a part of, counted over all
      stacks; 0 for none.
    partners: whole matrix -> its partner, with which it shares the damping, or itself.
    parts: whole matrix -> the number of parts that it is cut into.
    starts: (block, factor) -> the place of its first matrix among all of its stack, in the order of the factors.
    local_inverses: whether some inverses stay with their owners, see `Deal`.
  """

  stacks: dict[str, Stack]
  places: dict[tuple[str, str], tuple[str, Int[np.ndarray, ' matrices']]]
  orders: dict[str, Int[np.ndarray, ' positions'] | None]
  wholes: dict[str, Int[np.ndarray, 'owners slots']]
  partners: Int[np.ndarray, ' wholes']
  parts: Int[np.ndarray, ' wholes']
  starts: dict[tuple[str, str], int]
  local_inverses: bool = False

  def __eq__(self, other: object) -> bool:
    """Checks whether both layouts put the same matrices in the same places."""
    if self is other:
      return True
    if not isinstance(other, Layout) or self.stacks != other.stacks or self.places.keys() != other.places.keys():
      return False
    theirs = other.places
    return all(
      name == theirs[key][0] and np.array_equal(index, theirs[key][1]) for key, (name, index) in self.places.items()
    )

  def __hash__(self) -> int:
    return hash(tuple(self.stacks.items()))

  def gather(
    self, values: Mapping[str, Mapping[str, Float[Array, '*shards slots n n']]]
  ) -> dict[str, Float[Array, '*shards o s r c']]:
    """Makes stacks, (*shards, owners, slots, rows, n) by name, from factors.

    Args:
      values: block -> factor -> (*shards, slots, n, n).
    """
    return self.padded(self.joined(values))

  def gather_numbers(
    self, values: Mapping[str, Mapping[str, Shaped[Array, ' slots']]]
  ) -> dict[str, Shaped[Array, 'o s']]:
    """Makes (owners, slots) arrays by stack from one number for each matrix; padding slots are zero.

    Args:
      values: block -> factor -> (slots,).
    """
    result = {}
    for name, stack in self.stacks.items():
      flat = jnp.concatenate([values[b][f] for (b, f), (stack, _) in self.places.items() if stack == name])
      order = self.orders[name]
      if order is not None:
        flat = jnp.where(order < 0, 0, flat[np.maximum(order, 0)])
      result[name] = jnp.broadcast_to(flat, stack.shape[:2]) if stack.row_sharded else flat.reshape(stack.shape[:2])
    return result

  def read(self, stacks: Mapping[str, Shaped[Array, '...']], block: str, factor: str) -> Shaped[Array, '...']:
    """Reads one factor's matrices from stacks or from held inverses, or its numbers.

    Args:
      stacks: (owners, slots, rows, n), or held inverses (count, n, n), or numbers (owners, slots), by stack.
      block: the name of the block.
      factor: the name of the factor.

    Returns:
      (slots, n, n), or (slots,) for numbers, without padding.
    """
    name, index = self.places[block, factor]
    stack, x = self.stacks[name], stacks[name]
    if x.ndim == 3:
      start = self.starts[block, factor]
      return x[start : start + len(index)]
    if x.ndim == 2:
      return (x[0] if stack.row_sharded else x.reshape(-1))[index]
    return stack.matrices(x)[index]

  def padded(self, wholes: Mapping[str, Float[Array, '*shards m c c']]) -> dict[str, Float[Array, '*shards o s r n']]:
    """Makes stacks, (*shards, owners, slots, rows, n) by name, from all matrices in the order of the factors.

    Args:
      wholes: (*shards, count, n, n) by stack.
    """
    return {name: self.stacks[name].put(x, self.orders[name]) for name, x in wholes.items()}

  def unpadded(self, stacks: Mapping[str, Float[Array, 'o s r n']]) -> dict[str, Float[Array, 'm c c']]:
    """Applies the inverse of `padded` to `stacks` without shards, and returns (count, n, n) by stack."""
    return {name: self.stacks[name].matrices(x)[self.positions(name)] for name, x in stacks.items()}

  def positions(self, name: str) -> Int[np.ndarray, ' matrices']:
    """Returns the position of each matrix of the stack `name` among the slots of all owners.

    The matrices are in the order of the factors.
    """
    return np.concatenate([index for stack, index in self.places.values() if stack == name])

  def joined(
    self, values: Mapping[str, Mapping[str, Float[Array, '*shards slots n n']]]
  ) -> dict[str, Float[Array, '*shards m c c']]:
    """Joins factors by block into (*shards, count, n, n) by stack, in the order of the factors, and returns them.

    Args:
      values: block -> factor -> (*shards, slots, n, n).
    """
    rows: dict[str, list[Array]] = {name: [] for name in self.stacks}
    for (block, factor), (name, _) in self.places.items():
      rows[name].append(values[block][factor])
    return {name: jnp.concatenate(r, -3) if len(r) > 1 else r[0] for name, r in rows.items()}

  def mean_diagonals(
    self, stacks: Mapping[str, Float[Array, 'o s r n']], replicate: Callable = lambda x: x
  ) -> Float[Array, ' wholes']:
    """Returns the mean of the diagonal of each whole matrix, over its parts; number 0 belongs to no matrix.

    Args:
      stacks: (owners, slots, rows, n) by name.
      replicate: puts an array's values on every device, as `Placement.replicate` does; by default it does nothing.
    """
    diagonals = [jnp.where(s.diagonal(), stacks[name], 0).sum((-1, -2)) / s.n for name, s in self.stacks.items()]
    flat = replicate(jnp.concatenate(diagonals, axis=1)).reshape(-1)
    index = np.concatenate([self.wholes[name] for name in self.stacks], axis=1).reshape(-1)
    return jax.ops.segment_sum(flat, index, len(self.partners)) / self.parts.astype(flat.dtype)

  def sizes(self, blocks: Sequence[Block]) -> dict[str, Int[np.ndarray, 'owners slots']]:
    """Returns how many rows of each slot's matrix a factor of `blocks` fills, (owners, slots) by stack.

    It is all of them, except in the last part of an uneven split.
    """
    result = {name: np.full(stack.shape[:2], stack.n) for name, stack in self.stacks.items()}
    for block in blocks:
      for factor_name, factor in block.operator.factors.items():
        name, index = self.places[block.name, factor_name]
        result[name].reshape(-1)[index[factor.parts - 1 :: factor.parts]] = factor.size - (factor.parts - 1) * factor.n
    return result

  def zeros(self) -> Stacked:
    """Returns factors of zeros, (owners, slots, rows, n) by stack."""
    return Stacked(self, {name: jnp.zeros(stack.shape, stack.dtype) for name, stack in self.stacks.items()})

  def zero_numbers(self) -> Stacked:
    """Returns a zero for each matrix, (owners, slots) by stack."""
    return Stacked(self, {name: jnp.zeros(stack.shape[:2], stack.dtype) for name, stack in self.stacks.items()})

  def identities(self) -> Stacked:
    """Returns the inverses before the first refresh.

    They are (count, n, n) where every device holds them, else (owners, slots, rows, n).
    """
    arrays = {
      name: jnp.broadcast_to(jnp.eye(s.n, dtype=s.dtype), s.inverses) if s.shared else s.identities()
      for name, s in self.stacks.items()
    }
    return Stacked(self, arrays, held=True)


@jax.tree_util.register_pytree_with_keys_class
class Stacked(Mapping[str, Array]):
  """Holds arrays by stack, together with the layout that says which matrix of which block is where.

  Optimiser states keep factors, weights and inverses in it, so code that shards or saves a state knows them by type. It
  is a pytree and a mapping.

  Args:
    layout: from `lay_out`.
    arrays: by the name of the stack.
    held: whether the arrays are laid out as devices hold inverses (`Stack.inverses`), rather than each with its owner.
  """

  def __init__(self, layout: Layout, arrays: Mapping[str, Any], held: bool = False):
    self.layout, self.arrays, self.held = layout, arrays, held
    _tell_flax()

  def __getitem__(self, name: str) -> Any:
    return self.arrays[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.arrays)

  def __len__(self) -> int:
    return len(self.arrays)

  def __repr__(self) -> str:
    return f'Stacked({dict(self.arrays)!r}, held={self.held})'

  def filled(self, arrays: Mapping[str, Any]) -> Stacked:
    """Returns the same stacks with the arrays `arrays`, by name."""
    return Stacked(self.layout, arrays, self.held)

  def by_block(self) -> dict[str, dict[str, Shaped[Array, 'slots ...']]]:
    """Returns the arrays of each factor, by the names of its block and of the factor, without padding.

    They are (slots, n, n) for matrices, (slots,) for numbers.
    """
    factors: dict[str, dict[str, Array]] = {}
    for block, factor in self.layout.places:
      factors.setdefault(block, {})[factor] = self.layout.read(self.arrays, block, factor)
    return factors

  def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
    names = tuple(sorted(self.arrays))
    return tuple((jax.tree_util.DictKey(n), self.arrays[n]) for n in names), (self.layout, names, self.held)

  @classmethod
  def tree_unflatten(cls, static: Any, arrays: Sequence[Any]) -> Stacked:
    layout, names, held = static
    return cls(layout, dict(zip(names, arrays, strict=True)), held)


def _tell_flax() -> None:
  """Registers stacks with flax.serialization if that is loaded, because it only knows registered types."""
  flax = sys.modules.get('flax.serialization')
  if flax is None or Stacked in _TOLD:
    return
  _TOLD.add(Stacked)

  def read(stacked: Stacked, state: dict[str, Any]) -> Stacked:
    return stacked.filled(flax.from_state_dict(dict(stacked.arrays), state))

  flax.register_serialization_state(Stacked, lambda stacked: flax.to_state_dict(dict(stacked.arrays)), read)


_TOLD: set[type] = set()


def for_layout(update: Callable, layout: Layout) -> Callable:
  """Wraps an optimiser's `update` so that a state that was laid out otherwise is refused.

  Raises:
    CurvatureError: the state comes from another number of devices, another placement or another curvature.
  """

  def checked(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    check_layout(state, layout)
    return update(updates, state, params, **extra)

  return checked


def check_layout(state: Any, layout: Layout) -> None:
  """Raises CurvatureError unless all stacks of a state have this layout, and arrays of its shapes."""
  is_stacked = lambda x: isinstance(x, Stacked)  # noqa: E731
  for x in jax.tree.leaves(state, is_leaf=is_stacked):
    if is_stacked(x) and not (x.layout == layout and _has_its_shapes(x)):
      raise CurvatureError(
        'the optimiser state was laid out for other devices, another placement or another curvature; save '
        'kron.to_logical(state), and read it back by kron.from_logical(saved, tx.init(params))'
      )


def _has_its_shapes(x: Stacked) -> bool:
  """Checks the arrays of whole matrices; numbers by slot follow them."""
  if x.keys() != x.layout.stacks.keys():
    return False
  shapes = {name: stack.inverses if x.held else stack.shape for name, stack in x.layout.stacks.items()}
  return all(jnp.ndim(a) < 3 or jnp.shape(a) == shapes[name] for name, a in x.items())
