"""Adam in K-FAC's eigenbasis."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ..blocks.block import Block, key_of
from ..curvature import Curvature
from ..explicit import typed_update
from ..operators.factor import accurate
from ..param_trees import match
from ..placing import Local, Placement
from ..state.dealing import lay_out, undivided
from ..state.schedule import at, is_due
from ..state.stacks import for_layout
from .eigenbasis import Eigenbasis, matrix_shape, rotated, rotated_back
from .kfac import keeping_types
from .precondition import NOT_GIVEN, Phase, averaged, by_block, given, when


class ScaleByKfacAdamState(NamedTuple):
  """Holds the state of `scale_by_kfac_adam`.

  Attributes:
    eigenbasis: the averages of the factors, and their eigenvectors.
    mu: the average of the gradient, a tree like the parameters in at least float32.
    nu: the average of the gradient's squares in the eigenbasis, by block: (slots, rows, columns) for a kernel,
      (slots, n) for a block with one factor. Block names have '.' in place of '/'.
    rest: the average of the gradient's squares, by parameter, for parameters with entries in no block. Their names have
      '.' in place of '/'.
  """

  eigenbasis: Eigenbasis
  mu: PyTree
  nu: dict[str, Float[Array, ' slots *matrix']]
  rest: dict[str, Float[Array, '...']]


def scale_by_kfac_adam(
  curvature: Curvature,
  *,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.99,
  eps: float = 1e-8,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: int = 1,
  basis_every: int = 10,
  placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Applies Adam to the gradient in K-FAC's eigenbasis, with no damping to tune.

  The result is $U_A [\hat m' / (\sqrt{\hat v} + \epsilon)] U_G^T$, with $m' = U_A^T m U_G$ for the average m of the
  gradients, and v the average of the squares of $U_A^T V U_G$. The hats mark averages without their bias towards zero.
  Parameters without a block get plain Adam.

  Args:
    curvature: from `kron.curvature`.
    b1: the decay of m, as in `optax.scale_by_adam`; a number or a schedule.
    b2: the decay of v, as in `optax.scale_by_adam`; a number or a schedule.
    eps: epsilon, as in `optax.scale_by_adam`.
    decay: the decay of the factors' moving averages, as in `scale_by_kfac`.
    statistics_every: as in `scale_by_kfac`.
    basis_every: the number of updates between two computations of the eigenvectors. v is kept, because eigenvectors
      come in order.
    placement: as in `scale_by_kfac`.

  Returns:
    A transformation whose `update` takes `stats=` and `phase=`, as `scale_by_kfac` does.

  Raises:
    CurvatureError: when `update` is called, for any reason that `scale_by_kfac` names.

  References:
    George et al., 2018 (arXiv:1806.03884), section 4; SOAP (Vyas et al., 2024, arXiv:2409.11321) is the same in
    Shampoo's eigenbasis.
  """
  blocks, placement = curvature.blocks, placement or Local()
  layout = lay_out(blocks, undivided(placement))

  whole = {name for b in blocks if not b.partial for name in b.params}

  def of_rest(leaves: dict[str, Array]) -> dict[str, Array]:
    return {key_of(name): x for name, x in leaves.items() if name not in whole}

  def init(params):
    mu = jax.tree.map(lambda p: jnp.zeros_like(accurate(p)), params)
    nu = {key_of(b.name): jnp.zeros(matrix_shape(b), b.dtype) for b in blocks}
    leaves = match(params, curvature.parameters).leaves
    rest = {name: jnp.zeros_like(accurate(p)) for name, p in of_rest(leaves).items()}
    return ScaleByKfacAdamState(Eigenbasis.of_nothing(layout), mu, nu, rest)

  def update(updates, state, params=None, *, stats=NOT_GIVEN, phase: Phase | None = None, **extra):
    del params, extra
    stats = given(stats, phase)
    eigenbasis, count = state.eigenbasis, state.eigenbasis.count
    averages = averaged(eigenbasis, stats, phase, blocks, decay, statistics_every, placement)
    eigenbasis = eigenbasis._replace(averages=averages)
    due = is_due(count, basis_every) if phase is None else phase == 'refresh'
    eigenbasis = when(due, lambda e: e.refreshed(layout, blocks, placement), eigenbasis)
    first, second = at(b1, count), at(b2, count)
    mu = jax.tree.map(lambda m, g: first * m + (1 - first) * accurate(g), state.mu, updates)
    tree = match(updates, curvature.parameters)
    gradients = {name: accurate(g) for name, g in tree.leaves.items()}
    second_of = lambda old, g: second * old + (1 - second) * g.astype(old.dtype) ** 2  # noqa: E731
    rest = {name: second_of(state.rest[name], g) for name, g in of_rest(gradients).items()}
    nu = dict(state.nu)

    def divided(m: Array, n: Array) -> Array:
      """Returns Adam's step, with both averages divided by the sums of their weights, as they begin at zero."""
      steps = count + 1
      return (m / (1 - first**steps)) / (jnp.sqrt(n / (1 - second**steps)) + eps)

    def square(block: Block, v: Array) -> Array:
      nu[key_of(block.name)] = second_of(nu[key_of(block.name)], rotated(block, v, eigenbasis.of(block)))
      return v

    def adam(block: Block, m: Array) -> Array:
      vectors, n = eigenbasis.of(block), nu[key_of(block.name)]
      step = jnp.where(_above_rounding(n), divided(rotated(block, m, vectors), n), 0)
      return rotated_back(block, step, vectors)

    by_block(gradients, blocks, placement, square)
    means = tree.named(mu)
    plain = {name: divided(m, rest[key_of(name)]) if key_of(name) in rest else m for name, m in means.items()}
    new = tree.rebuilt(by_block(means, blocks, placement, adam, otherwise=plain))
    new = jax.tree.map(lambda x, u: x.astype(u.dtype), new, updates)
    eigenbasis = eigenbasis._replace(count=optax.safe_increment(count))
    return new, ScaleByKfacAdamState(eigenbasis, mu, nu, rest)

  return optax.GradientTransformationExtraArgs(init, typed_update(for_layout(update, layout)))


def _above_rounding(nu: Float[Array, ' s *n']) -> Bool[Array, ' s *n']:
  """Tells for each direction whether its gradient is more than rounding error.

  Some directions, such as the sum of a softmax's logits, have no gradient. Adam would turn their rounding errors into
  steps of full length.
  """
  total = nu.sum(tuple(range(1, nu.ndim)), keepdims=True)
  return nu > (4 * jnp.finfo(nu.dtype).eps) ** 2 * total


def kfac_adam(
  learning_rate: optax.ScalarOrSchedule,
  curvature: Curvature,
  *,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  **settings: Any,
) -> optax.GradientTransformationExtraArgs:
  """Makes Adam in K-FAC's eigenbasis: `scale_by_kfac_adam`, decoupled weight decay and the learning rate in one chain.

  Args:
    learning_rate: a number or a schedule.
    curvature: from `kron.curvature`.
    weight_decay: decoupled weight decay, which adds this times the parameters to Adam's step; a number or a schedule.
    **settings: the other arguments of `scale_by_kfac_adam`: `b1`, `b2`, `eps`, `decay`, `statistics_every`,
      `basis_every` and `placement`.

  Returns:
    A transformation whose `update` takes `stats=` and `phase=`, see `scale_by_kfac_adam`.
  """
  plain = optax.chain(
    scale_by_kfac_adam(curvature, **settings),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  return keeping_types(plain)
