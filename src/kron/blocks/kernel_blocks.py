"""The block of a kernel: the approximation of its curvature, its factors and its uses."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..errors import CurvatureError
from ..operators import Kronecker, Unitwise
from ..operators.factor import Factor, split, whole
from ..operators.weights import Arrangement
from ..reading.sites import Site
from .options import Options, chosen


class Use(NamedTuple):
  """A site with its place in a block: the layout of its matrix or channels, and the bias that is added to its result.

  linear: the site that has the matrix: this site or, for a lifted kernel, the site where the kernel met a constant
    (`Survey.lifted`).
  """

  site: Site
  linear: Site | None
  layout: Arrangement
  transposed: bool
  shift: Site | None
  shift_layout: Arrangement | None


def kernel_block(
  group: list[Use], sizes: tuple[tuple[int, ...], ...], loops: int, name: str, options: Options
) -> Kronecker | Unitwise:
  first = next(u for u in group if not u.transposed)
  shift = next((u for u in group if u.shift is not None), None)
  linear, one_hot = first.linear.linear, any(u.linear.linear.one_hot for u in group)
  slots, n_in = loops * linear.slots, linear.n_in + (shift is not None)
  parts = chosen(options.blocks, name) or {}
  rows = _side(slots, n_in, 'G', options, parts.get('A', 1)) if not one_hot else Factor(slots, n_in, 1, n_in, 'G')
  columns = _side(slots, linear.n_out, 'A', options, parts.get('G', 1))
  transposed = any(u.transposed for u in group)
  reduced = None
  if chosen(options.sharing, name) == 'reduce':
    reduced = _reduced(group, name, one_hot or transposed or any(u.linear is not u.site for u in group))
  bias = None if shift is None else shift.shift_layout
  approximation = chosen(options.approximation, name) or 'kronecker'
  if approximation == 'kronecker':
    return Kronecker(linear.name, first.layout, bias, sizes, rows, columns, loops, reduced, transposed)
  # For one-hot rows a, the product a aT is already diagonal.
  diagonal = approximation == 'diagonal' or one_hot or n_in > options.max_factor
  layouts = (linear.name, first.layout, bias, sizes)
  return Unitwise(*layouts, slots, n_in, linear.n_out, diagonal, loops, reduced, transposed)


def _side(slots: int, size: int, partner: str, options: Options, parts: int) -> Factor:
  if 1 < parts <= size:
    return split(slots, size, -(-size // parts), partner)
  if size <= options.max_factor:
    return whole(slots, size, partner)
  return split(slots, size, 1 if options.oversize == 'diagonal' else options.max_factor, partner)


def _reduced(group: list[Use], name: str, unfit: bool) -> int:
  """Returns the number of examples of a kernel with sharing='reduce'."""
  if unfit:
    raise CurvatureError(
      f"sharing={{{name!r}: 'reduce'}}: an embedding, a transposed use or a use of a constant supports only 'expand'"
    )
  if any(u.site.sharded for u in group):
    raise CurvatureError(f"sharing={{{name!r}: 'reduce'}} inside of a shard_map is not supported; use 'expand'")
  counts = set()
  for u in group:
    y = jax.ShapeDtypeStruct(u.site.op.outputs[0].shape, jnp.float32)
    counts.add(jax.eval_shape(u.site.linear.output_rows, y).shape[1])
  if len(counts) > 1:
    raise CurvatureError(f"sharing={{{name!r}: 'reduce'}}: its uses have {sorted(counts)} examples; use 'expand'")
  return counts.pop()


def flops(site: Site, operator: Kronecker | Unitwise) -> int:
  """Returns the flops of the products that a site's statistics add."""
  uses = math.prod(site.op.outputs[0].shape) // max(1, site.linear.n_out * site.linear.slots)
  return uses * operator.flops_of_use * site.linear.slots * site.times
