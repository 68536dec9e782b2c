"""Deals factors to devices from their shapes alone, after KAISA (Pauloski et al. 2021, arXiv:2107.01739).

Matrices are dealt to owners by the longest-processing-time rule. All owners run one program, so an owner's share of a
stack costs as much as the largest share. A matrix therefore goes to the owner that has the fewest matrices of its size.
Among several such owners, it goes to the one with the least work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..blocks.block import Block
from ..operators.factor import Factor
from ..placing import Placement
from .stacks import Layout, Stack

_SMALL = 8  # matrices up to this size are dealt in runs rather than one by one


class Deal(NamedTuple):
  """Holds the settings for dealing factors to owners, the devices that keep and invert them.

  Attributes:
    owners: the number of owners.
    local_inverses: whether the inverses of each block stay with one owner, which multiplies the block's gradient
      (KAISA's MEM-OPT); else every device gets all inverses (COMM-OPT).
    row_sharded: whether matrices may be split by rows over all owners if there are too few of their size to balance the
      owners' loads.

  References:
    Pauloski et al., 2021 (arXiv:2107.01739), KAISA.
  """

  owners: int = 1
  local_inverses: bool = False
  row_sharded: bool = True


class Load(NamedTuple):
  """Holds the load of each owner, including its padding.

  Attributes:
    work: the sum of n^3 over its inverses.
    memory: the count of numbers that it holds.
  """

  work: float
  memory: float


Item = tuple[str, Any, tuple[tuple[str, Factor], ...]]  # a block's name, type and factors


def lay_out(blocks: Sequence[Block] | Sequence[Item], deal: Deal = Deal()) -> Layout:  # noqa: B008
  """Deals the factors of all blocks to owners, from their shapes alone, and returns where each matrix is.

  Matrices are dealt by the longest-processing-time rule (Pauloski et al. 2021, arXiv:2107.01739). All owners run one
  program, so an owner's share of a stack costs as much as the largest share. A matrix therefore goes to the owner that
  has the fewest matrices of its size. Among several such owners, it goes to the one with the least work.

  Args:
    blocks: `curvature.blocks`, or a tuple (name, type, ((factor's name, factor), ...)) for each block.
    deal: the settings; one owner by default.

  Returns:
    The `Layout`. With several owners and `deal.row_sharded`, it splits matrices by rows, the largest sizes first, until
    the load is within 10 % of a fair share or no further size helps.
  """
  return _best(_items(blocks), deal)


def _items(blocks: Sequence[Any]) -> tuple[Item, ...]:
  if not blocks or not isinstance(blocks[0], Block):
    return tuple(blocks)
  return tuple((b.name, np.dtype(b.dtype).name, tuple(b.operator.factors.items())) for b in blocks)


@functools.lru_cache(maxsize=64)
def _best(items: tuple[Item, ...], deal: Deal) -> Layout:
  """Returns the layout that splits the fewest sizes, largest first, with a load within 10% of a fair share."""
  plain = _lay_out(items, deal, 0)
  if deal.owners == 1 or not deal.row_sharded:
    return plain
  sizes = sorted({f.n for _, _, fs in items for _, f in fs if f.parts == 1 and f.n >= 4 * deal.owners}, reverse=True)
  whole = least(items, deal._replace(owners=1, local_inverses=False))
  copies = 1 if deal.local_inverses else deal.owners  # the copies of each inverse
  fair = Load(whole.work / deal.owners, whole.memory / 2 / deal.owners * (1 + copies))

  def excess(layout: Layout) -> float:
    """Returns the load relative to a fair share of work, and also of memory if inverses are local to save memory."""
    loaded = load(layout)
    return max(loaded.work / fair.work, loaded.memory / fair.memory if deal.local_inverses else 0)

  best = plain
  for n in sizes:
    if excess(best) <= 1.1:
      break
    best = min(best, _lay_out(items, deal, n), key=excess)
  return best


def load(layout: Layout) -> Load:
  """Returns the work of each owner at a refresh, and the averages and inverses that it holds.

  Args:
    layout: from `lay_out`.

  Returns:
    A named tuple of `work`, the sum of n^3 over an owner's slots (of n^2 times its rows, for matrices split by rows),
    and `memory`, the count of numbers; both include padding.
  """
  work = memory = 0
  for stack in layout.stacks.values():
    one = stack.slots * stack.rows * stack.n
    work += one * stack.n
    memory += one + (stack.count * stack.n**2 if stack.shared else one)
  return Load(work, memory)


def least(items: Sequence[Item] | Sequence[Block], deal: Deal) -> Load:
  """Returns a lower bound for an owner's load under any deal of whole matrices: a fair share, or the largest matrix.

  Args:
    items: `curvature.blocks`, or tuples as in `lay_out`.
    deal: the settings.

  Returns:
    A named tuple of `work`, the sum of n^3 over an owner's inverses, and `memory`, the count of numbers that it holds.
  """
  factors = [f for _, _, of_block in _items(items) for _, f in of_block]
  work, numbers = ([f.rows * f.n**p for f in factors] for p in (3, 2))
  largest = max(f.n for f in factors)
  averages = max(sum(numbers) / deal.owners, largest**2)
  inverses = max(sum(numbers) / (deal.owners if deal.local_inverses else 1), largest**2)
  return Load(max(sum(work) / deal.owners, largest**3), averages + inverses)


def _lay_out(items: tuple[Item, ...], deal: Deal, smallest_split: int) -> Layout:
  """Deals the factors, and splits those of size `smallest_split` or more by rows (0 splits none)."""
  names: dict[tuple[str, str], str] = {}
  kind_of: dict[str, str] = {}  # the kind of each stack
  units: list[tuple[int, int, list[tuple[str, str, int]]]] = []  # work, order, matrices that must be together
  for order, (block, dtype, factors) in enumerate(items):
    kinds = _kinds(factors, deal, smallest_split)
    for factor, f in factors:
      name = names[block, factor] = _name(f.n, dtype, kinds[factor])
      kind_of[name] = kinds[factor]
    for slot in range(factors[0][1].slots):
      dealt = [(factor, f) for factor, f in factors if kinds[factor] != 'row_sharded' and f.n > _SMALL]
      keys = [(block, factor, slot * f.parts + k) for factor, f in dealt for k in range(f.parts)]
      if keys:
        units.append((sum(f.parts * f.n**3 for _, f in factors), order, keys))
  owners = _Owners(deal)
  shapes = {(block, factor): f for block, _, factors in items for factor, f in factors}
  at: dict[tuple[str, str], np.ndarray] = {key: np.full(f.rows, -1) for key, f in shapes.items()}
  for _, _, matrices in sorted(units, key=lambda u: (-u[0], u[1])):
    among = owners.among([(names[b, f], shapes[b, f].n) for b, f, _ in matrices])
    for block, factor, row in sorted(matrices, key=lambda m: -shapes[m[0], m[1]].n):
      at[block, factor][row] = owners.place(names[block, factor], shapes[block, factor].n, among)
  return _layout(items, deal, names, kind_of, at, owners)


def _kinds(factors: Sequence[tuple[str, Factor]], deal: Deal, smallest_split: int) -> dict[str, str]:
  """Returns the kind of each factor: 'owned', 'row_sharded', or, if inverses are local, 'shared' by every device."""
  largest = max(factors, key=lambda f: f[1].n)[0]
  cut = any(f.parts > 1 for _, f in factors)
  splits = {name: bool(smallest_split) and not cut and f.n >= smallest_split for name, f in factors}
  if not deal.local_inverses:
    return {name: 'row_sharded' if splits[name] else 'owned' for name, _ in factors}
  # A block's gradient is multiplied where both of its inverses are, so only one of them can be divided.
  if cut or len(factors) == 1 or any(f.n <= _SMALL for _, f in factors):
    return dict.fromkeys(splits, 'shared')
  if splits[largest]:
    return {name: 'row_sharded' if name == largest else 'shared' for name, _ in factors}
  return dict.fromkeys(splits, 'owned')


def _name(n: int, dtype: str, kind: str) -> str:
  return f'n{n}' + ('' if dtype == 'float32' else f'_{dtype}') + ('' if kind == 'owned' else f'_{kind}')


class _Owners:
  """The loads of all owners while matrices are dealt."""

  def __init__(self, deal: Deal):
    self.deal = deal
    self.load = np.zeros(deal.owners)
    self.used: dict[str, np.ndarray] = {}

  def _counts(self, stack: str) -> np.ndarray:
    return self.used.setdefault(stack, np.zeros(self.deal.owners, int))

  def among(self, matrices: list[tuple[str, int]]) -> slice:
    """Returns the owners that may get these matrices: all owners, or a single owner if inverses are local.

    That owner has the fewest matrices of their largest size. Among several such owners, it has the least work.
    """
    if not self.deal.local_inverses:
      return slice(0, self.deal.owners)
    largest = max(matrices, key=lambda m: m[1])[0]
    best = int(np.lexsort((self.load, self._counts(largest)))[0])
    return slice(best, best + 1)

  def place(self, stack: str, n: int, among: slice) -> int:
    """Returns a new slot, as owner + owners * slot, and adds its work to the owner."""
    counts = self._counts(stack)
    owner = among.start + int(np.lexsort((self.load[among], counts[among]))[0])
    slot = counts[owner]
    counts[owner] += 1
    self.load[owner] += n**3
    return int(owner + self.deal.owners * slot)


def _layout(items, deal: Deal, names, kind_of, at, owners: _Owners) -> Layout:
  members: dict[str, list[tuple[str, str]]] = {}
  shapes, dtypes = {}, {}
  for block, dtype, factors in items:
    for factor, f in factors:
      members.setdefault(names[block, factor], []).append((block, factor))
      shapes[block, factor], dtypes[names[block, factor]] = f, jnp.dtype(dtype)
  stacks, places, starts, orders, wholes = {}, {}, {}, {}, {}
  numbers, total, parts = {}, 1, [1]
  for block, _, factors in items:
    for factor, f in factors:
      numbers[block, factor] = total
      total += f.slots
      parts += [f.parts] * f.slots
  for name in sorted(members):
    keys = members[name]
    f = shapes[keys[0]]
    rows = np.cumsum([0, *(shapes[key].rows for key in keys)])
    count, row_sharded = int(rows[-1]), kind_of[name] == 'row_sharded'
    if row_sharded:
      slots, index = count, np.arange(count)
    elif f.n <= _SMALL:
      slots, index = -(-count // deal.owners), np.arange(count)
    else:
      slots, dealt = int(owners.used[name].max()), np.concatenate([at[key] for key in keys])
      index = dealt % deal.owners * slots + dealt // deal.owners
    shared = not deal.local_inverses or kind_of[name] == 'shared'
    stack = Stack(deal.owners, slots, count, f.n, dtypes[name], row_sharded, shared)
    stacks[name] = stack
    positions = stack.slots if stack.row_sharded else stack.owners * stack.slots
    order = np.full(positions, -1)
    order[index] = np.arange(count)
    orders[name] = None if positions == count and (order == np.arange(positions)).all() else order
    whole = np.zeros(positions, np.int32)
    for key, start, stop in zip(keys, rows[:-1], rows[1:], strict=True):
      places[key], starts[key] = (name, index[start:stop]), int(start)
      own_numbers = np.arange(numbers[key], numbers[key] + shapes[key].slots)
      whole[index[start:stop]] = np.repeat(own_numbers, shapes[key].parts)
    wholes[name] = np.tile(whole, (deal.owners, 1)) if stack.row_sharded else whole.reshape(stack.owners, stack.slots)
  partners = np.arange(total)
  for block, _, factors in items:
    for factor, f in factors:
      if f.partner is not None:
        theirs = numbers[block, f.partner]
        partners[numbers[block, factor] + np.arange(f.slots)] = theirs + np.arange(f.slots)
  return Layout(stacks, places, orders, wholes, partners, np.asarray(parts), starts, deal.local_inverses)


def deal_of(placement: Placement) -> Deal:
  local_inverses = placement.local_inverses and placement.owners > 1
  return Deal(placement.owners, local_inverses, placement.row_sharded)


def undivided(placement: Placement) -> Deal:
  """Returns the deal for transformations that need whole matrices on every device."""
  return Deal(placement.owners, row_sharded=False)
