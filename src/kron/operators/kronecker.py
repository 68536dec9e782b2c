"""Blocks with two factors, F = A x G, for a kernel and possibly the bias added to its result.

Let a be the rows of the input (with a one appended if there is a bias) and g those of the loss's gradient at the
output. K-FAC *expand* has A = E[a aT] over all uses of the kernel and G = E[sum over an example's uses of g gT]
(Martens and Grosse 2015, eq. 1; Eschenhagen et al. 2023, eq. 12). *Reduce* first takes the mean of a and the sum of g
over each example's uses (Eschenhagen et al. 2023, eq. 17). The update of the gradient matrix V is A^-1 V G^-1.

A kernel may also be used transposed, such as a tied embedding in the decoder, or a layer in a derivative that the loss
itself takes. Then F = A x G + G' x A', with G' on the side of the rows and A' on the side of the columns. The block
replaces F by the product with the same partial traces: (tr G A + tr A' G') x (tr A G + tr G' A') / tr F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ..errors import CurvatureError
from ..statistics import BlockSums
from .conv import Conv
from .factor import Factor, accurate, gram, multiply, rotate
from .kernel import Linear, Side, flat, from_matrix, means_over_uses, scaled, sides, to_matrix, uses_of
from .weights import Arrangement


class Kronecker(NamedTuple):
  """The block of one kernel (slots, rows, columns) and its bias (slots, columns).

  rows, columns: the factors of all slots, including those of the `loops` iterations that slice the kernel.
  reduced: None for *expand*; for *reduce*, the number of examples. *Reduce* sums an example's rows before the products.
  transposed: whether some uses read the transposed matrix.
  """

  name: str
  kernel: Arrangement
  bias: Arrangement | None
  shapes: tuple[tuple[int, ...], ...]  # those of the kernel's parameters, then the bias's
  rows: Factor
  columns: Factor
  loops: int = 1
  reduced: int | None = None
  transposed: bool = False

  @property
  def factors(self) -> dict[str, Factor]:
    return {'A': self.rows, 'G': self.columns}

  def probes(self) -> BlockSums:
    """Returns the shapes of what `statistics` returns in one iteration; uses are counted for each slot."""
    a, g = self.rows, self.columns
    slots = a.slots // self.loops
    if self.reduced is not None:
      return BlockSums({'A': (slots, self.reduced, a.size), 'G': (slots, self.reduced, g.size)}, {'A': (slots,)})
    by_rows, by_columns = (a.rows // self.loops, a.n, a.n), (g.rows // self.loops, g.n, g.n)
    products, uses = {'A': by_rows, 'G': by_columns}, {'A': (slots,)}
    if self.transposed:
      products, uses = products | {"A'": by_columns, "G'": by_rows}, uses | {"A'": (slots,)}
    return BlockSums(products, uses)

  @property
  def flops_of_use(self) -> int:
    """Returns the FLOPs of the products that one row of each side adds to the statistics."""
    return 2 * sum((1 if f.n == 1 else f.n) * f.parts * f.n for f in (self.rows, self.columns))

  @property
  def moments(self) -> tuple[int, int, int]:
    """Returns the shape of the second moments of the gradient matrix in one iteration."""
    return self.rows.slots // self.loops, self.rows.size, self.columns.size

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
    """Returns the statistics of one use of the kernel: sums of a aT and g gT over rows, or summed rows for *reduce*.

    Args:
      coefficient: the coefficients by which the weight scales the rows and columns of the operation's matrix.
      bias: whether this use adds the block's bias.
      transposed: whether the operation's rows are the block's columns.
      basis: eigenvectors of A and G. If given, the result has S too, the sum over uses of the squares of a gT in that
        basis.
    """
    g = linear.output_rows(dy)
    plain = not transposed and basis is None and self.reduced is None and self.rows.parts == 1
    if (
      plain
      and coefficient.rows is None
      and coefficient.where is None
      and isinstance(linear, Conv)
      and linear.by_distance(x)
    ):
      a, g = self._gram_by_distance(linear, x, coefficient.scale, bias), scaled(g, coefficient.columns)
      return BlockSums({'A': a[None], 'G': gram(self.columns, flat(g))}, {'A': uses_of(g)})
    if not linear.one_hot:
      return self.statistics_of_rows(linear.input_rows(x), g, coefficient, bias, transposed, basis)
    if coefficient.where is not None:
      x = linear.without(x, coefficient.where)
    counts, there = linear.input_diagonal(x), linear.present(x)
    by = coefficient.scale if coefficient.rows is None else coefficient.rows
    g = scaled(g, coefficient.columns) * there[..., None].astype(g.dtype)
    uses = there.sum((1, 2)).astype(jnp.float32)
    products = {'A': (counts * by**2).reshape(-1, 1, 1), 'G': gram(self.columns, flat(g))}
    if basis is not None:  # a diagonal has the axes as its eigenvectors
      squares = rotate(self.columns, basis['G'], flat(g)) ** 2
      products['S'] = linear.scatter(x, squares) * jnp.reshape(by**2, (-1, 1) if jnp.ndim(by) else ())
    return BlockSums(products, {'A': uses})

  def _gram_by_distance(self, conv: Conv, x: Array, scale: float, bias: bool) -> Float[Array, 'i i']:
    a = conv.input_gram(x) * scale**2
    if self.bias is None:
      return a
    sums = conv.input_sum(x) * (scale * bias)
    corner = jnp.full((1, 1), conv.places(x) * bias, a.dtype)
    return jnp.block([[a, sums[:, None]], [sums[None], corner]])

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
    a, g = sides(self, a, g, coefficient, bias, transposed)
    if self.reduced is not None:
      return BlockSums({'A': accurate(a).sum(2), 'G': accurate(g).sum(2)}, {'A': uses_of(g, coefficient.where)})
    along, across = (flat(g), flat(a)) if transposed else (flat(a), flat(g))
    moments = self._second_moments(along, across, basis)
    by_rows, by_columns, uses = gram(self.rows, along), gram(self.columns, across), uses_of(g, coefficient.where)
    if transposed:
      return BlockSums({"A'": by_columns, "G'": by_rows, **moments}, {"A'": uses})
    return BlockSums({'A': by_rows, 'G': by_columns, **moments}, {'A': uses})

  def _second_moments(
    self, a: Inexact[Array, 's k i'], g: Inexact[Array, 's k o'], basis: Mapping[str, Array] | None
  ) -> dict[str, Array]:
    """Sums the squares of a gT in the basis over the rows (George et al. 2018, eq. 10)."""
    if basis is None:
      return {}
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(g):
      raise CurvatureError('second moments in an eigenbasis are not available for complex activations; use kron.kfac')
    a, g = rotate(self.rows, basis['A'], a) ** 2, rotate(self.columns, basis['G'], g) ** 2
    return {'S': jnp.einsum('ski,sko->sio', a, g)}

  def finish(self, sums: BlockSums, basis: Mapping[str, Array] | None = None) -> BlockSums:
    """Turns what came back through the probes into sums over examples and uses."""
    if self.reduced is None:
      return sums
    a, g, each = means_over_uses(self, sums)
    moments = self._second_moments(a, g, basis)
    return BlockSums({'A': gram(self.rows, a), 'G': gram(self.columns, g), **moments}, {'A': sums.uses['A'] / each})

  def combine(self, means: dict[str, Array]) -> dict[str, Array]:
    """Combines the means of all statistics into the factors A and G.

    Given the shards' shares of the means, it returns the shards' shares of both factors.
    """
    if not self.transposed:
      return {'A': means['A'], 'G': means['G']}
    a, g, back_a, back_g = (means[k] for k in ('A', 'G', "A'", "G'"))
    # The traces sum over all shards, so that every shard's share is combined with the same numbers.
    tr = lambda factor, m: jnp.trace(m, axis1=-2, axis2=-1).reshape(-1, factor.slots, factor.parts).sum((0, 2))  # noqa: E731
    spread = lambda factor, t: jnp.repeat(t, factor.parts)[:, None, None]  # noqa: E731
    at, gt, bat, bgt = tr(self.rows, a), tr(self.columns, g), tr(self.columns, back_a), tr(self.rows, back_g)
    root = jnp.sqrt(jnp.maximum(at * gt + bgt * bat, jnp.finfo(at.dtype).tiny))
    rows = spread(self.rows, gt / root) * a + spread(self.rows, bat / root) * back_g
    columns = spread(self.columns, at / root) * g + spread(self.columns, bgt / root) * back_a
    return {'A': rows, 'G': columns}

  def to_matrix(self, *gradients: Array) -> Float[Array, 's i o']:
    return to_matrix(self, gradients)

  def from_matrix(self, v: Float[Array, 's i o']) -> list[Array]:
    return from_matrix(self, v)

  def precondition(self, v: Float[Array, 's i o'], inverses: dict[str, Array]) -> Float[Array, 's i o']:
    v = multiply(self.rows, inverses['A'], v)
    if self.columns.parts == 1:
      return v @ inverses['G']
    return jnp.swapaxes(multiply(self.columns, inverses['G'], jnp.swapaxes(v, 1, 2)), 1, 2)
