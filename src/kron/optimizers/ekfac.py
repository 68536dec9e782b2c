"""EKFAC: K-FAC with the eigenvalues measured again in its eigenbasis."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..blocks.block import Block, key_of
from ..curvature import Curvature
from ..errors import CurvatureError
from ..explicit import typed_update
from ..operators import Kronecker
from ..param_trees import match
from ..placing import Local, Placement
from ..state.dealing import lay_out, undivided
from ..state.schedule import at, is_due
from ..state.stacks import for_layout
from ..statistics import Statistics
from .eigenbasis import Eigenbasis, Vectors, matrix_shape, rotated, rotated_back
from .kfac import descend
from .precondition import NOT_GIVEN, Phase, averaged, by_block, given, when


class ScaleByEkfacState(NamedTuple):
  """Holds the state of `scale_by_ekfac`.

  Attributes:
    eigenbasis: the averages of the factors, and their eigenvectors.
    moments: averaged second moments of each block's gradient matrix in the eigenbasis, by block: (slots, rows, columns)
      for a kernel, (slots, n) for a block with one factor. Block names have '.' in place of '/'.
  """

  eigenbasis: Eigenbasis
  moments: dict[str, Float[Array, ' slots *matrix']]


def scale_by_ekfac(
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: int = 1,
  basis_every: int = 10,
  placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Preconditions as K-FAC does, with a diagonal that is measured in the eigenbasis instead of factored.

  The result is $U_A [(U_A^T V U_G) / (S + \lambda)] U_G^T$, with $S_{ij} = E[(u_i^T a\, g^T v_j)^2]$ over the uses of
  the kernel. At a refresh, S restarts from the products of the eigenvalues of A and G. This equals K-FAC with the
  damping added to the product. A block of scale and shift is treated exactly, as in `scale_by_kfac`.

  Args:
    curvature: from `kron.curvature`.
    damping: lambda, in the unit of the curvature; a number or a schedule.
    decay: the decay of the moving averages of the factors and of S, as in `scale_by_kfac`.
    statistics_every: as in `scale_by_kfac`.
    basis_every: the number of updates between two computations of the eigenvectors; S may be fresher.
    placement: as in `scale_by_kfac`.

  Returns:
    A transformation whose `update` takes `phase=` and `damping=`, as `scale_by_kfac` does, and `stats=` from
    `value_and_grad(..., basis=kron.basis(state, curvature))`.

  Raises:
    CurvatureError: when `update` is given statistics without second moments in the basis, or for any reason that
      `scale_by_kfac` names.

  References:
    George et al., 2018 (arXiv:1806.03884), algorithm 1.
  """
  blocks, placement = curvature.blocks, placement or Local()
  layout = lay_out(blocks, undivided(placement))

  def init(params):
    match(params, curvature.parameters)
    moments = {key_of(b.name): jnp.ones(matrix_shape(b), b.dtype) for b in blocks}
    return ScaleByEkfacState(Eigenbasis.of_nothing(layout), moments)

  def refresh(state: ScaleByEkfacState) -> ScaleByEkfacState:
    eigenbasis = state.eigenbasis.refreshed(layout, blocks, placement)
    means = eigenbasis.averages.means()
    moments = {}
    for b in blocks:
      factors = {f: layout.read(means, b.name, f) for f in b.operator.factors}
      weight = layout.read(eigenbasis.averages.weights, b.name, next(iter(factors)))
      products = _products(b, factors, eigenbasis.of(b))
      known = jnp.isfinite(products).all() & (weight > 0).all()
      moments[key_of(b.name)] = jnp.where(known, products, state.moments[key_of(b.name)])
    return ScaleByEkfacState(eigenbasis, moments)

  def measure(state: ScaleByEkfacState, stats: Statistics) -> ScaleByEkfacState:
    rate = at(decay, state.eigenbasis.count)
    moments = dict(state.moments)
    for b in blocks:
      if not isinstance(b.operator, Kronecker):
        continue
      if 'S' not in stats.sums[b.name]:
        raise CurvatureError(
          f'the statistics of {b.name!r} have no second moments; '
          'call value_and_grad(..., basis=kron.basis(state, curvature))'
        )
      old, new = state.moments[key_of(b.name)], stats.means(b.name)['S']
      # Before the first refresh there are no moments to average with.
      known = (layout.read(state.eigenbasis.averages.weights, b.name, 'A') > 0).all()
      take = jnp.isfinite(new).all() & (stats.examples > 0) & known
      share = jnp.asarray(rate, old.dtype)
      moments[key_of(b.name)] = jnp.where(take, share * old + (1 - share) * new, old)
    return state._replace(moments=moments)

  def update(updates, state, params=None, *, stats=NOT_GIVEN, phase: Phase | None = None, **extra):
    del params
    stats = given(stats, phase)
    count = state.eigenbasis.count
    if stats is not None:
      # The moments come first, because they were measured in the basis before this refresh.
      due = is_due(count, statistics_every) if phase is None else True
      state = when(due, lambda s: measure(s, stats), state)
      averages = averaged(state.eigenbasis, stats, phase, blocks, decay, statistics_every, placement)
      state = state._replace(eigenbasis=state.eigenbasis._replace(averages=averages))
    due = is_due(count, basis_every) if phase is None else phase == 'refresh'
    state = when(due, refresh, state)
    strength = at(damping, count) if extra.get('damping') is None else extra['damping']

    def precondition(block: Block, v: Array) -> Array:
      vectors = state.eigenbasis.of(block)
      s = state.moments[key_of(block.name)]
      return rotated_back(block, rotated(block, v, vectors) / (s + jnp.asarray(strength, s.dtype)), vectors)

    tree = match(updates, curvature.parameters)
    updates = tree.rebuilt(by_block(tree.leaves, blocks, placement, precondition))
    eigenbasis = state.eigenbasis._replace(count=optax.safe_increment(count))
    return updates, state._replace(eigenbasis=eigenbasis)

  return optax.GradientTransformationExtraArgs(init, typed_update(for_layout(update, layout)))


def _products(block: Block, factors: dict[str, Array], vectors: Vectors) -> Array:
  """Returns the products of A's and G's eigenvalues, shaped like the gradient matrix, or the eigenvalues of F."""
  values = {f: jnp.maximum(jnp.einsum('sji,sjk,ski->si', u, factors[f], u), 0) for f, u in vectors.items()}
  if not isinstance(block.operator, Kronecker):
    return values['F']
  whole = {f: values[f].reshape(factor.slots, -1)[:, : factor.size] for f, factor in block.operator.factors.items()}
  return whole['A'][:, :, None] * whole['G'][:, None, :]


def ekfac(
  learning_rate: optax.ScalarOrSchedule,
  curvature: Curvature,
  *,
  momentum: optax.ScalarOrSchedule = 0.9,
  kl_clip: optax.ScalarOrSchedule | None = 0.1,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  **settings: Any,
) -> optax.GradientTransformationExtraArgs:
  """Makes the EKFAC optimiser: `kfac` with `scale_by_ekfac` instead of `scale_by_kfac`.

  Args:
    learning_rate: a number or a schedule.
    curvature: from `kron.curvature`.
    momentum: as in `kfac`.
    kl_clip: as in `kfac`.
    weight_decay: as in `kfac`.
    **settings: `damping`, `decay`, `statistics_every`, `basis_every` and `placement` of `scale_by_ekfac`.

  Returns:
    A transformation whose `update` takes `stats=`, `phase=` and `damping=`, see `scale_by_ekfac`.
  """
  natural = scale_by_ekfac(curvature, **settings)
  return descend(natural, learning_rate, momentum=momentum, kl_clip=kl_clip, weight_decay=weight_decay)
