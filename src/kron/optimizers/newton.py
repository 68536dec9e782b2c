"""Newton, Gauss-Newton and natural gradient with one interface, matrix-free.

Each solves (C + damping I) x = g by conjugate gradients. C is the Hessian, the generalised Gauss-Newton matrix or the
Fisher information of the whole network, and is known only by its products with vectors. K-FAC, or any other linear
transformation, can be the preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..errors import CurvatureError
from ..operators.factor import accurate
from ..products import Products
from ..trees import add, dot

Matrix = Literal['hessian', 'gauss_newton', 'fisher']


class Solution(NamedTuple):
  """Holds the result of `conjugate_gradients`.

  Attributes:
    x: the solution, a tree like g.
    iterations: the number of products, not counting the one for the starting point.
    residual: |g - M x| / |g| by the recursion of the method. If the first direction had negative curvature, it is the
      residual of the starting point.
    negative: whether negative curvature ended the solution.
  """

  x: PyTree
  iterations: Int[Array, '']
  residual: Float[Array, '']
  negative: Bool[Array, '']


def conjugate_gradients(
  product: Callable[[PyTree], PyTree],
  g: PyTree,
  *,
  x0: PyTree,
  preconditioner: Callable[[PyTree], PyTree] = lambda r: r,
  max_iterations: int | Int[Array, ''] = 20,
  tolerance: float | Float[Array, ''] = 1e-3,
) -> Solution:
  """Solves M x = g for a symmetric M, by preconditioned conjugate gradients.

  A direction of negative curvature ends the solution, and x keeps its value from before that direction. If it is the
  first direction, x is the starting point plus that direction; from a start at zero, this is the preconditioned
  gradient (Nocedal and Wright 2006, algorithm 7.1, without a trust region).

  Args:
    product: v -> M v, for trees like g.
    g: the right-hand side, a tree of arrays.
    x0: the starting point, a tree like g.
    preconditioner: r -> P r, for a symmetric positive definite P near the inverse of M; the identity by default.
    max_iterations: the largest number of products, not counting the one for x0.
    tolerance: the largest residual |g - M x|, as a share of |g|, at which it stops.

  Returns:
    A named tuple of `x` (a tree like g), `iterations` (the number of products, without the one for x0), `residual`
    (|g - M x| / |g|; that of x0 if the first direction had negative curvature), and `negative` (whether negative
    curvature ended the solution). The last three are arrays of shape ().
  """
  size = jnp.sqrt(dot(g, g))

  def unfinished(carry):
    _, r, _, _, i, negative = carry
    return (jnp.sqrt(dot(r, r)) > tolerance * size) & (i < max_iterations) & ~negative

  def step(carry):
    x, r, p, rz, i, _ = carry
    along = product(p)
    bend = dot(p, along)
    negative = bend <= 0
    a = jnp.where(negative, 0, rz / jnp.where(negative, 1, bend))
    first = jnp.where(negative & (i == 0), 1, a)
    x, r = add(x, first, p), add(r, -a, along)
    z = preconditioner(r)
    new = dot(r, z)
    return x, r, add(z, new / jnp.where(rz > 0, rz, 1), p), new, i + 1, negative

  r = add(g, -1, product(x0))
  z = preconditioner(r)
  start = x0, r, z, dot(r, z), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
  x, r, _, _, iterations, negative = jax.lax.while_loop(unfinished, step, start)
  return Solution(x, iterations, jnp.sqrt(dot(r, r)) / jnp.where(size > 0, size, 1), negative)


class ScaleByCurvatureState(NamedTuple):
  """Holds the state of `scale_by_curvature`.

  Attributes:
    count: the number of updates so far.
    solution: the last finite solution, a tree like the parameters in at least float32; zeros before the first.
    iterations: the number of products that the last solution took.
    residual: the last solution's |g - M x| / |g|, with M the damped curvature.
    negative: whether negative curvature ended the last solution.
    preconditioner: the state of the preconditioner.
  """

  count: Int[Array, '']
  solution: PyTree
  iterations: Int[Array, '']
  residual: Float[Array, '']
  negative: Bool[Array, '']
  preconditioner: optax.OptState


def scale_by_curvature(
  matrix: Matrix,
  *,
  damping: optax.ScalarOrSchedule,
  max_iterations: int = 20,
  tolerance: float = 1e-3,
  warm_start: float = 0.0,
  preconditioner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiplies the gradient by $(C + \lambda I)^{-1}$ for the curvature C of the whole network.

  It solves $(C + \lambda I) x = g$ by `conjugate_gradients`, which needs only products of C with vectors.

  Args:
    matrix: the kind of C: 'hessian', 'gauss_newton' or 'fisher', see `Products`.
    damping: lambda, in the unit of the curvature; a number or a schedule. `update(..., damping=)` replaces it.
    max_iterations: the largest number of products of an update, see `conjugate_gradients`.
    tolerance: the largest residual, as a share of the gradient's length, see `conjugate_gradients`.
    warm_start: the share of the last solution from which the next one starts (Martens 2010 uses 0.95).
    preconditioner: a transformation that is linear in the gradient and symmetric positive definite, as `scale_by_kfac`
      is, with the same damping. It is first given the statistics, and then every residual. None for no preconditioner.

  Returns:
    A transformation whose `update` needs `products=curvature.products(params, *batch)`. It passes further extra
    arguments, such as `stats=` and `phase=`, to the preconditioner.

  Raises:
    CurvatureError: the kind of C is unknown; or, when `update` is called, no products are given, or the loss has none
      of this kind.

  References:
    Martens, 2010 (Deep learning via Hessian-free optimization); for the natural gradient Pascanu and Bengio, 2013
    (arXiv:1301.3584).
  """
  if matrix not in ('hessian', 'gauss_newton', 'fisher'):
    raise CurvatureError(f"matrix={matrix!r} is unknown; choose 'hessian', 'gauss_newton' or 'fisher'")
  inner = optax.with_extra_args_support(preconditioner or optax.identity())

  def init(params):
    return ScaleByCurvatureState(
      count=jnp.zeros((), jnp.int32),
      solution=jax.tree.map(lambda p: jnp.zeros_like(accurate(p)), params),
      iterations=jnp.zeros((), jnp.int32),
      residual=jnp.zeros((), jnp.float32),
      negative=jnp.zeros((), bool),
      preconditioner=inner.init(params),
    )

  def update(updates, state, params=None, *, products: Products | None = None, **extra):
    if products is None:
      raise CurvatureError('update needs products=curvature.products(params, *batch)')
    _, inner_state = inner.update(updates, state.preconditioner, params, **extra)
    still = {**extra, 'stats': None, 'phase': 'plain'}
    strength = extra.get('damping')
    if strength is None:
      strength = damping(state.count) if callable(damping) else damping
    g = jax.tree.map(accurate, updates)
    solution = conjugate_gradients(
      lambda v: add(getattr(products, matrix)(v), strength, v),
      g,
      x0=jax.tree.map(lambda x: warm_start * x, state.solution),
      preconditioner=lambda r: inner.update(r, inner_state, params, **still)[0],
      max_iterations=max_iterations,
      tolerance=tolerance,
    )
    finite = jnp.isfinite(dot(solution.x, solution.x))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), solution.x, state.solution)
    state = ScaleByCurvatureState(
      optax.safe_increment(state.count),
      kept,
      solution.iterations,
      solution.residual.astype(jnp.float32),
      solution.negative,
      inner_state,
    )
    return jax.tree.map(lambda x, u: x.astype(u.dtype), solution.x, updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def newton(
  learning_rate: optax.ScalarOrSchedule, *, damping: optax.ScalarOrSchedule = 1e-3, **settings: Any
) -> optax.GradientTransformationExtraArgs:
  r"""Makes Newton's method, $\theta - \alpha (H + \lambda I)^{-1} g$, with the Hessian H of the loss on the batch.

  Args:
    learning_rate: alpha, the length of the step; 1 is the full step. A number or a schedule.
    damping: lambda, in the unit of the curvature; a number or a schedule.
    **settings: `max_iterations`, `tolerance`, `warm_start` and `preconditioner` of `scale_by_curvature`.

  Returns:
    A transformation whose `update` needs `products=curvature.products(params, *batch)`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from kronmesh import kron
    >>> def loss_fn(params, x):
    ...   return jnp.sum(kron.observe.gaussian(x * params['w'] - 1) ** 2) / 2
    >>> params, x = {'w': jnp.zeros(2)}, jnp.asarray([[1.0, 2.0]])
    >>> curvature = kron.curvature(loss_fn, params, x, fisher='exact')
    >>> tx = kron.newton(1.0, damping=0.0)
    >>> loss, grads, _ = curvature.value_and_grad(params, x, statistics=False)
    >>> updates, _ = tx.update(grads, tx.init(params), params, products=curvature.products(params, x))
    >>> updates['w'].round(4).tolist()
    [1.0, 0.5]
  """
  return _rule('hessian', learning_rate, damping=damping, **settings)


def gauss_newton(
  learning_rate: optax.ScalarOrSchedule, *, damping: optax.ScalarOrSchedule = 1e-3, **settings: Any
) -> optax.GradientTransformationExtraArgs:
  r"""Makes the Gauss-Newton method, $\theta - \alpha (J^T H_z J + \lambda I)^{-1} g$.

  J is the jacobian of the loss's marked outputs z, and $H_z$ the Hessian of the loss in z (Schraudolph 2002, Fast
  curvature matrix-vector products).

  Args:
    learning_rate: alpha, the length of the step; 1 is the full step. A number or a schedule.
    damping: lambda, in the unit of the curvature; a number or a schedule.
    **settings: `max_iterations`, `tolerance`, `warm_start` and `preconditioner` of `scale_by_curvature`.

  Returns:
    A transformation whose `update` needs `products=curvature.products(params, *batch)`.
  """
  return _rule('gauss_newton', learning_rate, damping=damping, **settings)


def natural_gradient(
  learning_rate: optax.ScalarOrSchedule, *, damping: optax.ScalarOrSchedule = 1e-3, **settings: Any
) -> optax.GradientTransformationExtraArgs:
  r"""Makes natural-gradient descent, $\theta - \alpha (F + \lambda I)^{-1} g$ (Amari 1998, theorem 1).

  The `fisher` of the products decides what F is: the Fisher information of the likelihood ('exact'), of drawn targets
  ('sampled'), or of the loss's gradients ('empirical').

  Args:
    learning_rate: alpha, the length of the step; 1 is the full step. A number or a schedule.
    damping: lambda, in the unit of the curvature; a number or a schedule.
    **settings: `max_iterations`, `tolerance`, `warm_start` and `preconditioner` of `scale_by_curvature`.

  Returns:
    A transformation whose `update` needs `products=curvature.products(params, *batch)`, whose `fisher` is that of the
    curvature unless `products` is given another.
  """
  return _rule('fisher', learning_rate, damping=damping, **settings)


def _rule(matrix: Matrix, learning_rate: optax.ScalarOrSchedule, **settings: Any) -> Any:
  return optax.chain(scale_by_curvature(matrix, **settings), optax.scale_by_learning_rate(learning_rate))
