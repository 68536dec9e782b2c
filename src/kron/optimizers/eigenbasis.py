"""The eigenbasis of K-FAC's blocks, which EKFAC and K-FAC Adam work in.

With A = U_A diag(a) U_AT and G likewise, a gradient matrix V becomes V' = U_AT V U_G. The curvature is nearly diagonal
in this basis. The methods differ in the numbers by which they divide the entries of V' (`ekfac.py`, `kfac_adam.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..blocks.block import Block
from ..curvature import Curvature
from ..operators import Kronecker
from ..placing import Placement
from ..state.averages import Averages
from ..state.stacks import Layout, Stacked
from .precondition import find_state

Vectors = dict[str, Float[Array, 'slots n n']]  # by factor


class Eigenbasis(NamedTuple):
  """Holds averages of the factors, and the factors' eigenvectors at the last refresh.

  It is a part of the states of `scale_by_ekfac` and `scale_by_kfac_adam`.

  Attributes:
    count: the number of updates so far.
    averages: the moving averages of the factors, in stacks.
    vectors: the eigenvectors as columns, in stacks, in ascending order of eigenvalue; identities before the first
      refresh.
    rejected_inverses: the number of decompositions dropped so far because they were not finite.
  """

  count: Int[Array, '']
  averages: Averages
  vectors: Stacked
  rejected_inverses: Int[Array, '']

  @classmethod
  def of_nothing(cls, layout: Layout) -> Eigenbasis:
    zero = jnp.zeros((), jnp.int32)
    return cls(zero, Averages.of_nothing(layout), layout.identities(), zero)

  def refreshed(self, layout: Layout, blocks: Sequence[Block], placement: Placement) -> Eigenbasis:
    means = self.averages.means()
    decompose = placement.over_stacks(_decompose)
    extended = _beyond_the_end(means, layout.sizes(blocks))
    vectors, dropped = decompose(extended, self.averages.weights, placement.own(self.vectors, layout))
    vectors = placement.share(vectors, layout, symmetric=False)
    rejected = self.rejected_inverses + dropped.sum(dtype=jnp.int32)
    return self._replace(vectors=self.vectors.filled(vectors), rejected_inverses=rejected)

  def of(self, block: Block) -> Vectors:
    """Returns the eigenvectors of `block` by factor, (slots, n, n) each."""
    return {f: self.vectors.layout.read(self.vectors, block.name, f) for f in block.operator.factors}


def _decompose(means, weights, old) -> tuple[dict[str, Array], Int[Array, ' o']]:
  """Returns eigenvectors in ascending order of eigenvalue, and each owner's number of dropped decompositions.

  A slot keeps its old eigenvectors if the new ones are not finite or if its factor has no statistics yet.
  """
  vectors, dropped = {}, []
  for stack, x in means.items():
    if x.shape[-1] == 1:
      vectors[stack] = old[stack]
      continue
    new = jnp.linalg.eigh(x)[1]
    finite, known = jnp.isfinite(new).all((-1, -2)), weights[stack] > 0
    vectors[stack] = jnp.where((finite & known)[..., None, None], new, old[stack])
    dropped.append((~finite & known).sum(1))
  owners = next(iter(old.values())).shape[0]
  return vectors, sum(dropped, start=jnp.zeros(owners, jnp.int32))


def _beyond_the_end(means: Mapping[str, Array], sizes: Mapping[str, np.ndarray]) -> dict[str, Array]:
  """Gives the padding of a last diagonal block the largest eigenvalues, so that its eigenvectors come last."""
  result = {}
  for stack, x in means.items():
    n = x.shape[-1]
    if (sizes[stack] == n).all():
      result[stack] = x
      continue
    beyond = jnp.arange(n) >= jnp.asarray(sizes[stack])[..., None]
    largest = 1 + 2 * jnp.trace(x, axis1=-2, axis2=-1)[..., None]
    result[stack] = x + jnp.where(beyond, largest, 0)[..., None] * jnp.eye(n, dtype=x.dtype)
  return result


def rotated(block: Block, v: Array, vectors: Vectors) -> Array:
  """Rotates a gradient matrix into the eigenbasis: V' = U_AT V U_G."""
  rows = next(iter(vectors))  # A, or F in a block with one factor
  return block.operator.precondition(v, {f: jnp.swapaxes(u, 1, 2) if f == rows else u for f, u in vectors.items()})


def rotated_back(block: Block, v: Array, vectors: Vectors) -> Array:
  """Rotates a matrix back from the eigenbasis: V = U_A V' U_GT."""
  rows = next(iter(vectors))
  return block.operator.precondition(v, {f: u if f == rows else jnp.swapaxes(u, 1, 2) for f, u in vectors.items()})


def basis(state: Any, curvature: Curvature) -> dict[str, Vectors]:
  """Reads the eigenvectors of all blocks with two factors from an optimiser state, for `value_and_grad(..., basis=)`.

  Args:
    state: an optax state that contains the state of one `scale_by_ekfac` or `scale_by_kfac_adam`.
    curvature: the curvature that the optimiser was made with.

  Returns:
    block -> factor ('A' or 'G') -> eigenvectors as columns, (slots, n, n): one matrix for each matrix of the factor.
    They are identities before the first refresh.

  Raises:
    CurvatureError: there is no such state, or there are several.
  """
  held = find_state(state, Eigenbasis)
  return {b.name: held.of(b) for b in curvature.blocks if isinstance(b.operator, Kronecker)}


def matrix_shape(block: Block) -> tuple[int, ...]:
  """Returns the shape of the block's gradient matrix."""
  operator = block.operator
  if isinstance(operator, Kronecker):
    return operator.rows.slots, operator.rows.size, operator.columns.size
  return operator.factors['F'].slots, operator.factors['F'].n
