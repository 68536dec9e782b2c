r"""Rules that set damping, learning rate and momentum from a quadratic model of the loss.

Let F be the Fisher information of the whole network (known by its products with vectors, not by blocks), $\lambda$ the
damping, and $\eta$ the coefficient of an l2 term in the loss. The model of a step $\delta$ is then
$M(\delta) = h + g^T \delta + \delta^T (F + (\lambda + \eta) I) \delta / 2$ (Martens and Grosse 2015, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..curvature import Curvature
from ..errors import CurvatureError
from ..operators.factor import accurate
from ..products import Products
from ..state.schedule import at
from ..trees import add, dot
from .kfac import shortening
from .precondition import scale_by_kfac


class QuadraticStepState(NamedTuple):
  """Holds the state of `quadratic_step`.

  Attributes:
    count: the number of updates so far.
    previous: the last step, a tree like the parameters in at least float32; zeros before the first step.
    learning_rate: the model's last choice of the learning rate, before `scale` and the clip; 0 before the first step.
    momentum: the model's last choice of the momentum, before `scale` and the clip; 0 before the first step.
    clip: the factor by which the last step was shortened, 1 if it was not shortened.
    inner: the state of the wrapped transformation.
  """

  count: Int[Array, '']
  previous: PyTree
  learning_rate: Float[Array, '']
  momentum: Float[Array, '']
  clip: Float[Array, '']
  inner: optax.OptState


def quadratic_step(
  inner: optax.GradientTransformation,
  *,
  damping: optax.ScalarOrSchedule = 1e-3,
  l2: float = 0.0,
  use_momentum: bool = True,
  scale: optax.ScalarOrSchedule = 1.0,
  kl_clip: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces learning rate and momentum by the step $-\alpha\Delta + \mu\delta_0$ that minimises the quadratic model.

  $\Delta$ is the update that `inner` makes from the gradient, and $\delta_0$ is the previous step. The model of a step
  $\delta$ is $M(\delta) = h + g^T \delta + \delta^T (F + (\lambda + \eta) I) \delta / 2$, with the loss h, its gradient
  g, and the Fisher information F of the whole network. Each step computes two forward derivatives.

  Args:
    inner: a transformation whose update approximates $F^{-1} g$, such as `scale_by_kfac`.
    damping: lambda of the model, unless `update` is given `damping=`; a number or a schedule.
    l2: eta, if the loss has a term eta / 2 times the sum of all squared parameters.
    use_momentum: False chooses the learning rate only.
    scale: a factor that multiplies the chosen step; as a schedule, it can end a run with smaller steps.
    kl_clip: the largest $\delta^T F \delta$ of a step, in nats, as in `clip_by_kl` but with the F of the whole network;
      None for no clip. Without a clip, steps grow where the curvature changes within a step, because the loss then does
      not fall as the model predicts.

  Returns:
    A transformation whose `update` takes the arguments of `inner` and
    `products=curvature.products(params, *batch, fisher='exact')` for the gradient's batch, or a function that makes
    them. It returns steps to add to the parameters.

  Raises:
    CurvatureError: when `update` is called without products.

  References:
    Martens and Grosse, 2015 (arXiv:1503.05671), sections 6.4 and 7.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    zero = jnp.zeros((), jnp.float32)
    previous = jax.tree.map(lambda p: jnp.zeros_like(accurate(p)), params)
    return QuadraticStepState(jnp.zeros((), jnp.int32), previous, zero, zero, jnp.ones_like(zero), inner.init(params))

  def update(updates, state, params=None, *, products: Products | Callable[[], Products] | None = None, **extra):
    natural, inner_state = inner.update(updates, state.inner, params, products=products, **extra)
    strength = extra.get('damping')
    strength = at(damping, state.count) if strength is None else strength
    g, natural = jax.tree.map(accurate, updates), jax.tree.map(accurate, natural)
    directions = [jax.tree.map(jnp.negative, natural), *([state.previous] if use_momentum else [])]
    forms = _made(products).forms(directions)
    weights = _minimum(forms + (strength + l2) * _gram(directions), jnp.stack([dot(g, d) for d in directions]))
    rate, momentum = (*weights, jnp.zeros(()))[:2]
    weights = weights * at(scale, state.count)
    clip = jnp.ones(())
    if kl_clip is not None:
      clip = shortening(weights @ forms @ weights, at(kl_clip, state.count))
    step = jax.tree.map(jnp.zeros_like, natural)
    for weight, direction in zip(weights * clip, directions, strict=True):
      step = add(step, weight, direction)
    chosen = (x.astype(jnp.float32) for x in (rate, momentum, clip))
    state = QuadraticStepState(optax.safe_increment(state.count), step, *chosen, inner_state)
    return jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def _gram(directions: Sequence[PyTree]) -> Float[Array, 'k k']:
  return jnp.stack([jnp.stack([dot(u, v) for v in directions]) for u in directions])


def _minimum(matrix: Float[Array, 'k k'], slopes: Float[Array, ' k']) -> Float[Array, ' k']:
  """Returns -matrix^-1 slopes for one or two directions; a second that vanishes or repeats the first gets weight 0."""
  first = -slopes[0] / jnp.where(matrix[0, 0] > 0, matrix[0, 0], jnp.inf)
  alone = jnp.zeros_like(slopes).at[0].set(first)
  if len(slopes) == 1:
    return alone
  scales = jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), jnp.finfo(matrix.dtype).tiny))
  cosine = matrix[0, 1] / (scales[0] * scales[1])
  # Closer than this, the two directions differ only by rounding.
  apart = (1 - cosine**2 > 1e-6) & (matrix[1, 1] > 0)
  unit = slopes / scales
  both = -jnp.stack([unit[0] - cosine * unit[1], unit[1] - cosine * unit[0]]) / jnp.where(apart, 1 - cosine**2, 1)
  return jnp.where(apart, both / scales, alone)


def _made(products: Products | Callable[[], Products] | None) -> Products:
  if products is None:
    raise CurvatureError("update needs products=curvature.products(params, *batch, fisher='exact')")
  return products if isinstance(products, Products) else products()


class AdaptDampingState(NamedTuple):
  """Holds the state of `adapt_damping`.

  Attributes:
    count: the number of updates so far.
    damping: lambda of the next update.
    ratio: the last ratio of the actual to the predicted change of the loss; 1 before the first measurement, -1 if one
      of the changes was not finite, and 0 if the model predicted no decrease.
    inner: the state of the wrapped transformation.
  """

  count: Int[Array, '']
  damping: Float[Array, '']
  ratio: Float[Array, '']
  inner: optax.OptState


def adapt_damping(
  inner: optax.GradientTransformation,
  initial: float = 1.0,
  *,
  every: int = 5,
  rate: optax.ScalarOrSchedule = 0.95,
  smallest: float = 1e-8,
  largest: float = 1e4,
  l2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Adapts the damping to how well the quadratic model predicts the loss, by Levenberg and Marquardt's rule.

  Every `every` steps it measures $\rho = (h(\theta + \delta) - h(\theta)) / (M(\delta) - h(\theta))$, with the loss h
  and its quadratic model M (see `quadratic_step`). If rho is above 3/4, it multiplies the damping by rate^every. If rho
  is below 1/4, or the loss is not finite, it divides the damping by rate^every.

  Args:
    inner: a whole chain, including the learning rate, in which one link takes `damping=` in its update.
    initial: lambda at the first step.
    every: T_1 of the paper, the number of steps between two measurements.
    rate: omega_1 of the paper for one step; a number or a schedule.
    smallest: the lower bound of lambda.
    largest: the upper bound of lambda.
    l2: eta, as in `quadratic_step`.

  Returns:
    A transformation whose `update` takes the arguments of `inner`, `value=` (the loss), `value_fn=` (params -> loss,
    same batch and keys) and `products=` (or a function that makes them, which is called only when they are needed).

  Raises:
    CurvatureError: when `update` is called without one of these arguments.

  References:
    Martens and Grosse, 2015 (arXiv:1503.05671), section 6.5.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    number = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    return AdaptDampingState(jnp.zeros((), jnp.int32), number(initial), number(1.0), inner.init(params))

  def update(updates, state, params=None, *, value=None, value_fn=None, products=None, **extra):
    if value is None or value_fn is None:
      raise CurvatureError('adapt_damping: update needs value=loss and value_fn=(params -> loss on the same batch)')
    step, inner_state = inner.update(
      updates,
      state.inner,
      params,
      value=value,
      value_fn=value_fn,
      products=products,
      **{**extra, 'damping': state.damping},
    )

    def judged(damping: Array) -> tuple[Array, Array]:
      g, d = jax.tree.map(accurate, updates), jax.tree.map(accurate, step)
      change = value_fn(optax.apply_updates(params, step)) - value
      curved = _made(products).forms([d])[0, 0] + (damping + l2) * dot(d, d)
      predicted = dot(g, d) + curved / 2
      ratio = change / jnp.where(predicted < 0, predicted, jnp.inf)
      ratio = jnp.where(jnp.isfinite(change) & jnp.isfinite(predicted), ratio, -1)
      factor = jnp.asarray(at(rate, state.count), jnp.float32) ** every
      moved = jnp.where(ratio > 0.75, damping * factor, jnp.where(ratio < 0.25, damping / factor, damping))
      return jnp.clip(moved, smallest, largest).astype(damping.dtype), ratio.astype(jnp.float32)

    due = (state.count + 1) % every == 0
    damping, ratio = jax.lax.cond(due, judged, lambda damping: (damping, state.ratio), state.damping)
    return step, AdaptDampingState(optax.safe_increment(state.count), damping, ratio, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def adaptive_kfac(
  curvature: Curvature,
  *,
  damping: float = 1.0,
  damping_every: int = 5,
  damping_rate: optax.ScalarOrSchedule = 0.95,
  smallest_damping: float = 1e-8,
  scale: optax.ScalarOrSchedule = 1.0,
  kl_clip: optax.ScalarOrSchedule | None = None,
  l2: float = 0.0,
  **settings: Any,
) -> optax.GradientTransformationExtraArgs:
  """Makes K-FAC without a learning rate, momentum or damping to tune.

  It is `adapt_damping` of a `quadratic_step` of `scale_by_kfac`.

  Args:
    curvature: from `kron.curvature`.
    damping: the initial damping.
    damping_every: the number of steps between two changes of the damping, `every` in `adapt_damping`.
    damping_rate: `rate` in `adapt_damping`.
    smallest_damping: `smallest` in `adapt_damping`.
    scale: a factor that multiplies the chosen step, as in `quadratic_step`.
    kl_clip: as in `quadratic_step`; None for no clip.
    l2: as in `quadratic_step`.
    **settings: `decay`, `statistics_every`, `inverses_every` and `placement` of `scale_by_kfac`.

  Returns:
    A transformation whose `update` takes `stats`, `products`, `value` and `value_fn`, see `scale_by_kfac`,
    `quadratic_step` and `adapt_damping`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from kronmesh import kron
    >>> def loss_fn(params, x, y):
    ...   mean = kron.observe.gaussian(jnp.tanh(x @ params['w']) @ params['out'])
    ...   return 0.5 * ((mean - y) ** 2).sum(-1).mean()
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)); y = jnp.tanh(x @ jnp.ones((3, 2)))
    >>> params = {'w': 0.1 + jnp.eye(3, 4), 'out': jnp.full((4, 2), 0.1)}
    >>> curvature = kron.curvature(loss_fn, params, x, y, fisher='exact')
    >>> tx = kron.adaptive_kfac(curvature)
    >>> state, losses = tx.init(params), []
    >>> for _ in range(20):
    ...   loss, grads, stats = curvature.value_and_grad(params, x, y)
    ...   products = curvature.products(params, x, y)
    ...   updates, state = tx.update(grads, state, params, stats=stats, products=products, value=loss,
    ...                              value_fn=lambda p: loss_fn(p, x, y))
    ...   params = optax.apply_updates(params, updates); losses.append(float(loss))
    >>> losses[-1] < 0.1 * losses[0]
    True
  """
  natural = scale_by_kfac(curvature, damping=damping, **settings)
  step = quadratic_step(natural, damping=damping, l2=l2, scale=scale, kl_clip=kl_clip)
  return adapt_damping(step, damping, every=damping_every, rate=damping_rate, smallest=smallest_damping, l2=l2)
