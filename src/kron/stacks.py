"""Factors of one size live in one array, (owner, slot, n, n): one batched inverse per size, placed by its leading axis.

`lay_out` is a pure function of the blocks and the number of owners. Factors are dealt to owners by longest processing
time (n^3 for each slot); slots that an owner does not need are padding. The matrices of one factor stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .blocks import Block
from .operators.factor import Factor


class Place(NamedTuple):
  """Where a factor's matrices are: slots `start` to `start + slots` of an owner in the stack of this name."""

  stack: str
  owner: int
  start: int
  slots: int


class Layout(NamedTuple):
  """Places by (block, factor); shapes (owners, slots, n, n) and types by stack."""

  places: dict[tuple[str, str], Place]
  shapes: dict[str, tuple[int, int, int, int]]
  dtypes: dict[str, Any]
  groups: dict[
    str, np.ndarray
  ]  # stack -> (owners, slots): which whole matrix a slot is a part of, in all stacks together
  partners: np.ndarray  # group -> the group of its partner, or its own

  def gather(self, values: Mapping[str, Mapping[str, Array]], padding: float = 0.0) -> dict[str, Array]:
    """Stacks from factors by block, (slots, ...) each; padding slots hold a constant."""
    stacks = {}
    for stack, (owners, width, *_) in self.shapes.items():
      rows: list[list[Array]] = [[] for _ in range(owners)]
      tail: tuple[int, ...] = ()
      for (block, factor), place in self.places.items():
        if place.stack == stack:
          rows[place.owner].append(values[block][factor])
          tail = values[block][factor].shape[1:]
      for row in rows:
        missing = width - sum(len(part) for part in row)
        if missing:
          row.append(jnp.full((missing, *tail), padding, self.dtypes[stack]))
      stacks[stack] = jnp.stack([jnp.concatenate(row) if len(row) > 1 else row[0] for row in rows])
    return stacks

  def read(self, stacks: Mapping[str, Array], block: str, factor: str) -> Array:
    """One factor's (slots, ...) out of the stacks."""
    place = self.places[block, factor]
    return stacks[place.stack][place.owner, place.start : place.start + place.slots]

  def group_means(self, values: Mapping[str, Array], replicate: Callable = lambda x: x) -> Float[Array, 'groups']:
    """The mean of one number a slot over the parts of each whole matrix; padding slots are group 0, which is nobody's."""
    flat = replicate(jnp.concatenate([values[stack] for stack in self.shapes], axis=1)).reshape(-1)
    index = np.concatenate([self.groups[stack] for stack in self.shapes], axis=1).reshape(-1)
    counts = np.maximum(np.bincount(index, minlength=len(self.partners)), 1)
    return jax.ops.segment_sum(flat, index, len(self.partners)) / counts.astype(flat.dtype)

  def sizes(self, blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """For each slot how much of its matrix a factor fills: all, but for the last part of one that is cut unevenly."""
    result = {stack: np.full(shape[:2], shape[2]) for stack, shape in self.shapes.items()}
    for block in blocks:
      for name, factor in block.operator.factors.items():
        place = self.places[block.name, name]
        last = np.arange(place.start + factor.parts - 1, place.start + place.slots, factor.parts)
        result[place.stack][place.owner, last] = factor.size - (factor.parts - 1) * factor.n
    return result

  def used(self) -> dict[str, np.ndarray]:
    """For each slot whether a factor has it, as (owners, slots)."""
    result = {stack: np.zeros(shape[:2], bool) for stack, shape in self.shapes.items()}
    for place in self.places.values():
      result[place.stack][place.owner, place.start : place.start + place.slots] = True
    return result


def lay_out(blocks: Sequence[Block], owners: int = 1) -> Layout:
  """Deals the factors of all blocks to owners."""
  items: list[tuple[Block, str, Factor]] = [(b, name, f) for b in blocks for name, f in b.operator.factors.items()]
  load = [0] * owners
  used: dict[str, list[int]] = {}
  places, dtypes, sizes = {}, {}, {}
  for block, name, factor in sorted(items, key=lambda item: -item[2].rows * item[2].n ** 3):
    stack = f'n{factor.n}' + ('' if block.dtype == jnp.float32 else f'_{np.dtype(block.dtype).name}')
    owner = min(range(owners), key=lambda o: (load[o], o))
    load[owner] += factor.rows * factor.n**3
    start = used.setdefault(stack, [0] * owners)[owner]
    used[stack][owner] += factor.rows
    places[block.name, name] = Place(stack, owner, start, factor.rows)
    dtypes[stack], sizes[stack] = block.dtype, factor.n
  shapes = {stack: (owners, max(used[stack]), sizes[stack], sizes[stack]) for stack in sorted(used)}
  groups = {stack: np.zeros(shape[:2], np.int32) for stack, shape in shapes.items()}
  first: dict[tuple[str, str], int] = {}
  number = 1
  for block, name, factor in items:
    place = places[block.name, name]
    first[block.name, name] = number
    whole = np.repeat(np.arange(number, number + factor.slots), factor.parts)
    groups[place.stack][place.owner, place.start : place.start + place.slots] = whole
    number += factor.slots
  partners = np.arange(number)
  for block, name, factor in items:
    if factor.partner is not None:
      mine, theirs = first[block.name, name], first[block.name, factor.partner]
      partners[mine : mine + factor.slots] = np.arange(theirs, theirs + factor.slots)
  return Layout(places, shapes, dtypes, groups, partners)
