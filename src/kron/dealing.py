"""Which device owns which factor: a pure function of shapes, after KAISA (Pauloski et al. 2021, arXiv:2107.01739).

Owners are dealt matrices by longest processing time. All owners run one program, so an owner's share of a stack costs as
much as the largest share: the owner with the fewest of a size comes first, and among those the one with the least work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .block import Block
from .errors import CurvatureError
from .operators.factor import Factor
from .placing import Placement
from .stacks import Layout, Stack

_SMALL = 8  # matrices up to this size are dealt in runs, not one by one


class Deal(NamedTuple):
  """How factors are dealt.

  owners: how many there are.
  groups: of owners. The inverses of a block are kept by one group, whose members take turns in computing them: one group
    is KAISA's COMM-OPT, groups of one are MEM-OPT, others HYBRID.
  split: whether a size of which there are too few matrices for a fair deal may be split, by rows, over all owners.
  """

  owners: int = 1
  groups: int = 1
  split: bool = True

  @property
  def members(self) -> int:
    return self.owners // self.groups

  def check(self) -> None:
    if self.groups < 1 or self.owners % self.groups:
      raise CurvatureError(f'{self.owners} owners do not fall into {self.groups} groups; choose a divisor')


class Load(NamedTuple):
  """Of each owner, with the padding that all carry: work in n^3 for each inverse, memory in numbers held."""

  work: float
  memory: float


Item = tuple[str, Any, tuple[tuple[str, Factor], ...]]  # a block's name, type and factors


def lay_out(blocks: Sequence[Block], deal: Deal = Deal()) -> Layout:  # noqa: B008
  """Deals the factors of all blocks.

  Raises:
    CurvatureError: groups that are no divisor of the owners.
  """
  deal.check()
  return _best(_items(blocks), deal)


def _items(blocks: Sequence[Any]) -> tuple[Item, ...]:
  if not blocks or not isinstance(blocks[0], Block):
    return tuple(blocks)
  return tuple((b.name, np.dtype(b.dtype).name, tuple(b.operator.factors.items())) for b in blocks)


@functools.lru_cache(maxsize=64)
def _best(items: tuple[Item, ...], deal: Deal) -> Layout:
  """The layout that splits the fewest sizes, from the largest on, among those within a tenth of a fair deal."""
  plain = _lay_out(items, deal, 0)
  if deal.owners == 1 or not deal.split:
    return plain
  sizes = sorted({f.n for _, _, fs in items for _, f in fs if f.parts == 1 and f.n >= 4 * deal.owners}, reverse=True)
  whole = least(items, deal._replace(owners=1, groups=1))
  fair = Load(whole.work / deal.owners, whole.memory / 2 / deal.owners * (1 + deal.members))

  def excess(layout: Layout) -> float:
    """Over a fair share: of work, and of memory where that is what groups are for."""
    own = load(layout, deal)
    return max(own.work / fair.work, own.memory / fair.memory if deal.groups > 1 else 0)

  best = plain
  for n in sizes:
    if excess(best) <= 1.1:
      break
    best = min(best, _lay_out(items, deal, n), key=excess)
  return best


def load(layout: Layout, deal: Deal) -> Load:
  """What each owner does at a refresh, and holds: averages, and inverses as its group keeps them."""
  work = memory = 0
  for stack in layout.stacks.values():
    one = stack.slots * stack.rows * stack.n
    work += one * stack.n
    memory += one + (stack.count * stack.n**2 if stack.shared else one * deal.members)
  return Load(work, memory)


def least(items: Sequence[Item] | Sequence[Block], deal: Deal) -> Load:
  """What no deal of whole matrices can be below: a fair share, or the largest matrix."""
  factors = [f for _, _, own in _items(items) for _, f in own]
  work, numbers = ([f.rows * f.n**p for f in factors] for p in (3, 2))
  largest = max(f.n for f in factors)
  averages = max(sum(numbers) / deal.owners, largest**2)
  inverses = max(sum(numbers) / deal.groups, largest**2)
  return Load(max(sum(work) / deal.owners, largest**3), averages + inverses)


def _lay_out(items: tuple[Item, ...], deal: Deal, smallest_split: int) -> Layout:
  """The deal in which sizes from `smallest_split` on are split (0: none)."""
  names: dict[tuple[str, str], str] = {}
  units: list[tuple[int, int, list[tuple[str, str, int]]]] = []  # work, order, matrices that must be in one group
  for order, (block, dtype, factors) in enumerate(items):
    kinds = _kinds(factors, deal, smallest_split)
    for factor, f in factors:
      names[block, factor] = _name(f.n, dtype, kinds[factor], deal)
    for slot in range(factors[0][1].slots):
      dealt = [(factor, f) for factor, f in factors if kinds[factor] != 'split' and f.n > _SMALL]
      own = [(block, factor, slot * f.parts + k) for factor, f in dealt for k in range(f.parts)]
      if own:
        units.append((sum(f.parts * f.n**3 for _, f in factors), order, own))
  owners = _Owners(deal)
  shapes = {(block, factor): f for block, _, factors in items for factor, f in factors}
  at: dict[tuple[str, str], np.ndarray] = {key: np.full(f.rows, -1) for key, f in shapes.items()}
  for _, _, matrices in sorted(units, key=lambda u: (-u[0], u[1])):
    group = owners.group([(names[b, f], shapes[b, f].n) for b, f, _ in matrices])
    for block, factor, row in sorted(matrices, key=lambda m: -shapes[m[0], m[1]].n):
      at[block, factor][row] = owners.place(names[block, factor], shapes[block, factor].n, group)
  return _layout(items, deal, names, at, owners)


def _kinds(factors: Sequence[tuple[str, Factor]], deal: Deal, smallest_split: int) -> dict[str, str]:
  """'owned', 'split' or 'shared', by factor."""
  largest = max(factors, key=lambda f: f[1].n)[0]
  cut = any(f.parts > 1 for _, f in factors)
  splits = {name: bool(smallest_split) and not cut and f.n >= smallest_split for name, f in factors}
  if deal.groups == 1:
    return {name: 'split' if splits[name] else 'owned' for name, _ in factors}
  # Where inverses stay with groups, a block is multiplied where both of its inverses are: only one can be split.
  if cut or len(factors) == 1 or any(f.n <= _SMALL for _, f in factors):
    return dict.fromkeys(splits, 'shared')
  if splits[largest]:
    return {name: 'split' if name == largest else 'shared' for name, _ in factors}
  return dict.fromkeys(splits, 'owned')


def _name(n: int, dtype: str, kind: str, deal: Deal) -> str:
  own = '' if dtype == 'float32' else f'_{dtype}'
  grouped = f'_of{deal.groups}' if deal.groups > 1 else ''
  return f'n{n}{own}{grouped}' + ('' if kind == 'owned' else f'_{kind}')


class _Owners:
  """Loads while dealing."""

  def __init__(self, deal: Deal):
    self.deal = deal
    self.load = np.zeros(deal.owners)
    self.used: dict[str, np.ndarray] = {}

  def _counts(self, stack: str) -> np.ndarray:
    return self.used.setdefault(stack, np.zeros(self.deal.owners, int))

  def group(self, matrices: list[tuple[str, int]]) -> slice:
    """The owners of the group that is to have these: with the fewest of their sizes, then the least work."""
    deal = self.deal
    if deal.groups == 1:
      return slice(0, deal.owners)
    largest = max(matrices, key=lambda m: m[1])[0]
    counts = self._counts(largest).reshape(deal.groups, -1).sum(1)
    work = self.load.reshape(deal.groups, -1).sum(1)
    best = np.lexsort((work, counts))[0]
    return slice(best * deal.members, (best + 1) * deal.members)

  def place(self, stack: str, n: int, among: slice) -> int:
    """A new slot, as owner + owners * slot; the owner gets the work."""
    counts = self._counts(stack)
    owner = among.start + int(np.lexsort((self.load[among], counts[among]))[0])
    slot = counts[owner]
    counts[owner] += 1
    self.load[owner] += n**3
    return owner + self.deal.owners * slot


def _layout(items, deal: Deal, names, at, owners: _Owners) -> Layout:
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
    own = members[name]
    f = shapes[own[0]]
    rows = np.cumsum([0, *(shapes[key].rows for key in own)])
    count, split = int(rows[-1]), name.endswith('_split')
    if split:
      slots, index = count, np.arange(count)
    elif f.n <= _SMALL:
      slots, index = -(-count // deal.owners), np.arange(count)
    else:
      slots, dealt = int(owners.used[name].max()), np.concatenate([at[key] for key in own])
      index = dealt % deal.owners * slots + dealt // deal.owners
    shared = deal.groups == 1 or name.endswith('_shared')
    stack = Stack(deal.owners, slots, count, f.n, dtypes[name], split, shared)
    stacks[name] = stack
    positions = stack.slots if stack.split else stack.owners * stack.slots
    order = np.full(positions, -1)
    order[index] = np.arange(count)
    orders[name] = None if positions == count and (order == np.arange(positions)).all() else order
    whole = np.zeros(positions, np.int32)
    for key, start, stop in zip(own, rows[:-1], rows[1:], strict=True):
      places[key], starts[key] = (name, index[start:stop]), int(start)
      own_numbers = np.arange(numbers[key], numbers[key] + shapes[key].slots)
      whole[index[start:stop]] = np.repeat(own_numbers, shapes[key].parts)
    wholes[name] = np.tile(whole, (deal.owners, 1)) if stack.split else whole.reshape(stack.owners, stack.slots)
  partners = np.arange(total)
  for block, _, factors in items:
    for factor, f in factors:
      if f.partner is not None:
        theirs = numbers[block, f.partner]
        partners[numbers[block, factor] + np.arange(f.slots)] = theirs + np.arange(f.slots)
  return Layout(stacks, places, orders, wholes, partners, np.asarray(parts), starts, deal.groups)


def deal_of(placement: Placement) -> Deal:
  return Deal(placement.owners, placement.groups, placement.split)


def undivided(placement: Placement) -> Deal:
  """The deal with one group and nothing split: for what needs whole matrices on every device."""
  return Deal(placement.owners, split=False)
