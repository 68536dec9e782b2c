"""`kfac`: the links of K-FAC in one chain, and the clip that keeps its steps at a safe length."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..curvature import Curvature
from ..operators.factor import accurate
from ..placing import Placement
from ..state.schedule import Interval, at
from .precondition import scale_by_kfac


class ClipByKlState(NamedTuple):
  """Holds the state of `clip_by_kl`.

  Attributes:
    count: the number of updates so far.
    clip: the factor applied to the last update, 1 if nothing was clipped.
    inner: the state of the wrapped transformation.
  """

  count: Int[Array, '']
  clip: Float[Array, '']
  inner: optax.OptState


def clip_by_kl(
  inner: optax.GradientTransformation, max_kl: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
  r"""Shortens natural-gradient updates so that they change the model's distribution by a bounded amount.

  With gradient g, inner update u and learning rate $\alpha$, the KL divergence of a step is about
  $\alpha^2 u^T F u \approx \alpha^2 g^T u$; u is scaled by $\min(1, \sqrt{c / (\alpha^2 g^T u)})$.

  Args:
    inner: the transformation whose update approximates $F^{-1} g$. It is wrapped, not chained, because the clip also
      needs the raw gradient.
    max_kl: c, in nats; a number or a schedule.
    learning_rate: the rate of the coming step, as later given to `scale_by_learning_rate`; a number or a schedule.

  Returns:
    A transformation whose `update` takes the arguments of `inner` and returns the scaled u.

  References:
    Ba, Grosse and Martens, 2017 (Distributed second-order optimization using Kronecker-factored approximations),
    eq. 11.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return ClipByKlState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), inner.init(params))

  def update(updates, state, params=None, **extra):
    natural, inner_state = inner.update(updates, state.inner, params, **extra)
    rate, bound = at(learning_rate, state.count), at(max_kl, state.count)
    products = jax.tree.map(lambda g, u: jnp.sum(accurate(g) * accurate(u)), updates, natural)
    kl = rate**2 * sum(jax.tree.leaves(products), start=jnp.zeros(()))
    clip = shortening(kl, bound)
    natural = jax.tree.map(lambda u: u * clip.astype(u.dtype), natural)
    return natural, ClipByKlState(optax.safe_increment(state.count), clip.astype(state.clip.dtype), inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def shortening(kl: Float[Array, ''], bound: float | Float[Array, '']) -> Float[Array, '']:
  """Returns the factor that brings a step's divergence, quadratic in the step, down to the bound."""
  return jnp.where(kl > bound, jnp.sqrt(bound / jnp.where(kl > 0, kl, 1)), 1)


def kfac(
  learning_rate: optax.ScalarOrSchedule,
  curvature: Curvature,
  *,
  damping: optax.ScalarOrSchedule = 0.1,
  momentum: optax.ScalarOrSchedule = 0.9,
  kl_clip: optax.ScalarOrSchedule | None = 0.1,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  decay: optax.ScalarOrSchedule = 0.95,
  statistics_every: Interval = 1,
  inverses_every: Interval = 1,
  placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes the K-FAC optimiser: `scale_by_kfac` in a `clip_by_kl`, weight decay, momentum and learning rate.

  Args:
    learning_rate: a number or a schedule.
    curvature: from `kron.curvature`.
    damping: lambda, in the unit of the curvature, as in `scale_by_kfac`; a number or a schedule.
    momentum: heavy-ball coefficient on the preconditioned gradient; a number or a schedule.
    kl_clip: the largest KL divergence of a step before momentum, in nats; None for no clip. See `clip_by_kl`.
    weight_decay: decoupled weight decay, which adds this times the parameters to the natural gradient; a number or a
      schedule.
    decay: the decay of the factors' moving averages, as in `scale_by_kfac`; a number or a schedule.
    statistics_every: the number of updates between two uses of statistics, as in `scale_by_kfac`.
    inverses_every: the number of updates between two refreshes of the inverses, as in `scale_by_kfac`.
    placement: decides who owns which factors, as in `scale_by_kfac`; None for one owner.

  Returns:
    A transformation whose `update` takes `stats=`, `phase=` and `damping=`, see `scale_by_kfac`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from kronmesh import kron
    >>> def loss_fn(params, x, y, key):
    ...   mean = kron.observe.gaussian(x @ params['w'] + params['b'])
    ...   return 0.5 * ((mean - y) ** 2).sum(-1).mean()
    >>> key = jax.random.key(0)
    >>> x = jax.random.normal(key, (32, 3)); y = x @ jnp.ones((3, 2)) + 1
    >>> params = {'w': jnp.zeros((3, 2)), 'b': jnp.zeros(2)}
    >>> curvature = kron.curvature(loss_fn, params, x, y, key, fisher='exact')
    >>> tx = kron.kfac(1.0, curvature, damping=1e-4, momentum=0.0, kl_clip=None)
    >>> loss, grads, stats = curvature.value_and_grad(params, x, y, key)
    >>> updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    >>> float(loss_fn(optax.apply_updates(params, updates), x, y, key)) < 0.1 * float(loss)
    True
  """
  natural = scale_by_kfac(
    curvature,
    damping=damping,
    decay=decay,
    statistics_every=statistics_every,
    inverses_every=inverses_every,
    placement=placement,
  )
  return descend(natural, learning_rate, momentum=momentum, kl_clip=kl_clip, weight_decay=weight_decay)


def descend(
  natural: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: optax.ScalarOrSchedule = 0.9,
  kl_clip: optax.ScalarOrSchedule | None = 0.1,
  weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Chains a natural-gradient link in a `clip_by_kl` with weight decay, momentum and learning rate, as in `kfac`."""
  if kl_clip is not None:
    natural = clip_by_kl(natural, kl_clip, learning_rate)
  plain = optax.chain(
    natural,
    optax.add_decayed_weights(weight_decay),
    optax.trace(decay=momentum) if isinstance(momentum, int | float) else heavy_ball(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )
  return keeping_types(plain)


class HeavyBallState(NamedTuple):
  """State of `heavy_ball`."""

  count: Int[Array, '']
  trace: optax.Updates


def heavy_ball(momentum: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Adds the momentum (a number or a schedule) times the last step: `optax.trace` in the types of the updates."""

  def init(params):
    return HeavyBallState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    m = at(momentum, state.count)
    trace = jax.tree.map(lambda g, t: g + jnp.asarray(m, g.dtype) * t.astype(g.dtype), updates, state.trace)
    kept = jax.tree.map(lambda x, t: x.astype(t.dtype), trace, state.trace)
    return trace, HeavyBallState(optax.safe_increment(state.count), kept)

  return optax.GradientTransformation(init, update)


def keeping_types(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Makes a transformation's updates have the types of the gradients, whatever types its schedules have."""
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra):
    new, new_state = tx.update(updates, state, params, **extra)
    new_state = jax.tree.map(lambda x, old: x if x.dtype == old.dtype else x.astype(old.dtype), new_state, state)
    return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), new_state

  return optax.GradientTransformationExtraArgs(tx.init, update)
