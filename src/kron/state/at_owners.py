"""Preconditioning of gradients by the owners of the inverses (KAISA's MEM-OPT).

Each owner multiplies the gradients of its blocks, with one product for all gradients of one shape, and the results go
to every device. If the rows of a factor are divided over all owners, each owner multiplies with its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..blocks.block import Block
from ..placing import Placement
from .stacks import Layout


class _Class(NamedTuple):
  """Blocks with matrices of one shape and inverses in the same two stacks; the slots of all blocks are concatenated.

  units: (owner, place) -> slot, or -1 for padding. Every owner has all blocks of a row-sharded factor.
  rows, columns: the slots of A and G in the stacks, (owner, place), in each owner's numbering.
  """

  blocks: tuple[Block, ...]
  a: str
  g: str
  units: Int[np.ndarray, 'owners w']
  rows: Int[np.ndarray, 'owners w']
  columns: Int[np.ndarray, 'owners w']


def precondition_at_owners(
  inverses: Mapping[str, Array], blocks: Sequence[Block], layout: Layout, placement: Placement
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
  """Returns a function that maps gradient matrices V, by block name, to A^-1 V G^-1."""

  def apply(matrices: Mapping[str, Array]) -> dict[str, Array]:
    present = [b for b in blocks if b.name in matrices]
    result = {}
    local = []
    for b in present:
      if all(layout.stacks[layout.places[b.name, f][0]].shared for f in b.operator.factors):
        of_block = {f: layout.read(inverses, b.name, f) for f in b.operator.factors}
        result[b.name] = b.operator.precondition(matrices[b.name], of_block)
      else:
        local.append(b)
    classes = _classes(local, layout, placement)
    if not classes:
      return result
    inputs = [_laid_out(c, matrices) for c in classes]

    def multiply(stacks: dict[str, Array], inputs: list[Any]) -> list[Array]:
      return [_multiply(c, layout, stacks, *arrays) for c, arrays in zip(classes, inputs, strict=True)]

    products = placement.at_owners(multiply, layout)(inverses, inputs)
    for c, product in zip(classes, products, strict=True):
      result |= _taken_apart(c, layout, product)
    return result

  return apply


def _classes(blocks: Sequence[Block], layout: Layout, placement: Placement) -> list[_Class]:
  alike: dict[tuple, list[Block]] = {}
  for b in blocks:
    alike.setdefault((layout.places[b.name, 'A'][0], layout.places[b.name, 'G'][0]), []).append(b)
  owners, result = placement.owners, []
  for (a, g), members in alike.items():
    rows, columns = (np.concatenate([_slots(layout, b, f) for b in members]) for f in ('A', 'G'))
    stacks = layout.stacks[a], layout.stacks[g]
    if stacks[0].row_sharded or stacks[1].row_sharded:
      everyone = lambda x: np.tile(x, (owners, 1))  # noqa: E731
      result.append(_Class(tuple(members), a, g, everyone(np.arange(len(rows))), everyone(rows), everyone(columns)))
      continue
    owner = rows // stacks[0].slots
    width = np.bincount(owner, minlength=owners).max()
    units = np.full((owners, width), -1)
    for k in range(owners):
      mine = np.flatnonzero(owner == k)
      units[k, : len(mine)] = mine
    slots = lambda x, s, units=units: np.where(units < 0, 0, x[units] % s.slots)  # noqa: E731
    result.append(_Class(tuple(members), a, g, units, slots(rows, stacks[0]), slots(columns, stacks[1])))
  return result


def _slots(layout: Layout, block: Block, factor: str) -> np.ndarray:
  """Returns the positions of a factor's inverses in the arrays that are held."""
  name, index = layout.places[block.name, factor]
  return layout.starts[block.name, factor] + np.arange(len(index)) if layout.stacks[name].shared else index


def _laid_out(c: _Class, matrices: Mapping[str, Array]) -> tuple[Float[Array, 'owners w i o'], Array, Array]:
  v = jnp.concatenate([matrices[b.name] for b in c.blocks])
  return v[np.maximum(c.units, 0)], jnp.asarray(c.rows, jnp.int32), jnp.asarray(c.columns, jnp.int32)


def _multiply(
  c: _Class,
  layout: Layout,
  stacks: Mapping[str, Array],
  v: Float[Array, '1 w i o'],
  rows: Int[Array, '1 w'],
  columns: Int[Array, '1 w'],
) -> Float[Array, '1 w ...']:
  """Computes one owner's share: A^-1 V G^-1 for its matrices, or some rows of that product or of its transpose."""
  a, g = stacks[c.a], stacks[c.g]
  if layout.stacks[c.a].row_sharded:
    local_part = a[:, rows[0]]  # m w r i
    u = jnp.einsum('mwri,wio->wmro', local_part, v[0]).reshape(v.shape[1], -1, v.shape[-1])
    return (u @ _flat(g)[columns[0]])[None]
  if layout.stacks[c.g].row_sharded:
    local_part = g[:, columns[0]]
    u = jnp.einsum('mwro,wio->wmri', local_part, v[0]).reshape(v.shape[1], -1, v.shape[-2])
    return (u @ _flat(a)[rows[0]])[None]
  return (_flat(a)[rows[0]] @ v[0] @ _flat(g)[columns[0]])[None]


def _flat(stack: Float[Array, 'o s n n']) -> Float[Array, 'm n n']:
  return stack.reshape(-1, *stack.shape[-2:])


def _taken_apart(c: _Class, layout: Layout, product: Float[Array, 'owners w ...']) -> dict[str, Array]:
  """Splits the products of all owners into the matrix of each block."""
  a, g = layout.stacks[c.a], layout.stacks[c.g]
  if a.row_sharded or g.row_sharded:
    whole = jnp.moveaxis(product, 0, 1).reshape(product.shape[1], -1, product.shape[-1])
    slots = whole[:, : a.n] if a.row_sharded else jnp.swapaxes(whole[:, : g.n], 1, 2)
  else:
    place = np.zeros(c.units.max() + 1, int)
    used = c.units >= 0
    place[c.units[used]] = np.flatnonzero(used.reshape(-1))
    slots = product.reshape(-1, *product.shape[2:])[place]
  ends = np.cumsum([b.operator.factors['A'].slots for b in c.blocks])
  return {b.name: part for b, part in zip(c.blocks, jnp.split(slots, ends[:-1]), strict=True)}
