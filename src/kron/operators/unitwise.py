"""Blocks of kernels without Kronecker factors: one matrix for each output unit, or the diagonal alone.

The gradient of the kernel's column j from one use is a g_j. Unit j's block of the Fisher is thus E[g_j^2 a aT] (the
unit-wise natural gradient: Ollivier 2015, arXiv:1303.0818, section 2.3), and its diagonal is E[g_j^2 a^2]. Both are
exact if an example uses the kernel once. Several uses count as independent, or are summed first, as in `Kronecker`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ..errors import CurvatureError
from ..statistics import BlockSums
from .factor import Factor, accurate, whole
from .kernel import Linear, Side, from_matrix, means_over_uses, scaled, sides, to_matrix, uses_of
from .weights import Arrangement


class Unitwise(NamedTuple):
  """The block of one kernel and its bias, with F for each output unit, or for each entry if `diagonal`.

  slots, rows, columns: the size of the kernel's matrix with its bias; slots count the `loops` iterations that slice it.
  """

  name: str
  kernel: Arrangement
  bias: Arrangement | None
  shapes: tuple[tuple[int, ...], ...]
  slots: int
  rows: int
  columns: int
  diagonal: bool
  loops: int = 1
  reduced: int | None = None
  transposed: bool = False

  @property
  def factors(self) -> dict[str, Factor]:
    if self.diagonal:
      return {'F': whole(self.slots * self.columns * self.rows, 1)}
    return {'F': whole(self.slots * self.columns, self.rows)}

  @property
  def flops_of_use(self) -> int:
    return 2 * self.columns * self.rows * (1 if self.diagonal else self.rows)

  def probes(self) -> BlockSums:
    slots = self.slots // self.loops
    if self.reduced is not None:
      rows, columns = ((slots, self.reduced, n) for n in (self.rows, self.columns))
      return BlockSums({'A': rows, 'G': columns}, {'A': (slots,)})
    factor = self.factors['F']
    return BlockSums({'F': (factor.rows // self.loops, factor.n, factor.n)}, {})

  def statistics(
    self,
    linear: Linear,
    x: Array,
    dy: Array,
    coefficient: Side,
    bias: bool,
    transposed: bool,
    basis: Mapping[str, Array] | None = None,
  ) -> BlockSums:
    """Returns the statistics of one use of the kernel, with the arguments of `Kronecker.statistics`."""
    del basis
    g = linear.output_rows(dy)
    if not linear.one_hot:
      return self.statistics_of_rows(linear.input_rows(x), g, coefficient, bias, transposed)
    if coefficient.where is not None:
      x = linear.without(x, coefficient.where)
    g = scaled(g, coefficient.columns)  # a table has no bias
    by = coefficient.scale if coefficient.rows is None else coefficient.rows[..., None]
    squares = linear.scatter(x, accurate(g).reshape(g.shape[0], -1, g.shape[-1]) ** 2) * by**2
    return BlockSums({'F': self._laid_out(squares)}, {})

  def statistics_of_rows(
    self,
    a: Inexact[Array, 's b r i'],
    g: Inexact[Array, 's b r o'],
    coefficient: Side,
    bias: bool,
    transposed: bool,
    basis: Mapping[str, Array] | None = None,
  ) -> BlockSums:
    """Returns the same as `statistics`, given the rows."""
    del basis
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(g):
      raise CurvatureError(f"approximation: {self.name!r} with complex activations supports only 'kronecker'")
    a, g = sides(self, a, g, coefficient, bias, transposed)
    if self.reduced is not None:
      return BlockSums({'A': accurate(a).sum(2), 'G': accurate(g).sum(2)}, {'A': uses_of(g, coefficient.where)})
    flat = lambda rows: accurate(rows).reshape(rows.shape[0], -1, rows.shape[-1])  # noqa: E731
    return BlockSums({'F': self._of(flat(g), flat(a)) if transposed else self._of(flat(a), flat(g))}, {})

  def _of(self, a: Inexact[Array, 's k i'], g: Inexact[Array, 's k o']) -> Float[Array, 'm n n']:
    if self.diagonal:
      return self._laid_out(jnp.einsum('ski,sko->sio', a**2, g**2))

    def of_unit(g: Inexact[Array, 's k']) -> Float[Array, 's i i']:
      rows = a * g[..., None]
      return jnp.einsum('ski,skj->sij', rows, rows)

    # Go unit by unit, because all products at once, before the sum, would take as much memory as k kernels.
    matrices = jax.lax.map(of_unit, jnp.moveaxis(g, 2, 0))
    return jnp.moveaxis(matrices, 0, 1).reshape(-1, self.rows, self.rows)

  def _laid_out(self, entries: Float[Array, 's i o']) -> Float[Array, 'm 1 1']:
    return jnp.swapaxes(entries, 1, 2).reshape(-1, 1, 1)

  def finish(self, sums: BlockSums, basis: Mapping[str, Array] | None = None) -> BlockSums:
    """Turns what came back through the probes into sums over examples."""
    del basis
    if self.reduced is None:
      return sums
    a, g, _ = means_over_uses(self, sums)
    return BlockSums({'F': self._of(a, g)}, {})

  def combine(self, means: dict[str, Array]) -> dict[str, Array]:
    return means

  def to_matrix(self, *gradients: Array) -> Float[Array, 'm n']:
    v = to_matrix(self, gradients)
    return jnp.swapaxes(v, 1, 2).reshape(-1, self.factors['F'].n)

  def from_matrix(self, v: Float[Array, 'm n']) -> list[Array]:
    v = jnp.swapaxes(v.reshape(self.slots, self.columns, self.rows), 1, 2)
    return from_matrix(self, v)

  def precondition(self, v: Float[Array, 'm n'], inverses: dict[str, Array]) -> Float[Array, 'm n']:
    return jnp.einsum('mij,mj->mi', inverses['F'], v)
