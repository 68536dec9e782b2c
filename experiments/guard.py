"""What keeps a run from harm, on the device: a step that is not sound changes nothing, and those after it wait.

The host looks at the metrics of several steps at once. Until it has looked, and has decided what a fault means
(`faults.py`), the state stays as it was before the fault, so that the step can be looked into, left out or done otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.errors import ConfigError

POLICIES = ('stop', 'skip', 'damp', 'rollback')
_WARM = 20  # losses before the first that may be called a spike
_RATE = 0.05  # of the loss's moving mean and variance
_RELAX = 0.99  # of raised damping, at every step
_GROWS_EVERY = 2000  # steps without an overflow before the loss scale doubles (Micikevicius et al. 2018, section 3.2)


class Guard(NamedTuple):
  """held: a fault waits for the host. apply: whether the last gradient is sound. mean, variance: of the accepted losses.

  caution: what multiplies the damping. scale, since, overflows: the loss scale, steps since it changed, how often it was
  too large.
  """

  held: Bool[Array, '']
  apply: Bool[Array, '']
  mean: Float[Array, '']
  variance: Float[Array, '']
  seen: Int[Array, '']
  caution: Float[Array, '']
  scale: Float[Array, '']
  since: Int[Array, '']
  overflows: Int[Array, '']


def check(config: Any) -> None:
  """Raises ConfigError for a policy that is unknown or cannot be."""
  own = config.faults
  for name, more in (('not_finite', ()), ('spike', ('ignore',))):
    if own[name] not in (*POLICIES, *more):
      raise ConfigError(f'config.faults.{name}={own[name]!r} is unknown; choose from {", ".join((*POLICIES, *more))}')
    if own[name] == 'damp' and config.optimizer != 'kfac':
      raise ConfigError(f"config.faults.{name}='damp' raises K-FAC's damping; config.optimizer={config.optimizer!r}")
    if own[name] == 'rollback' and not config.keep_checkpoints:
      raise ConfigError(f"config.faults.{name}='rollback' needs checkpoints; config.keep_checkpoints=0 writes none")


def new_guard(config: Any) -> Guard:
  no, zero, none = jnp.zeros((), bool), jnp.zeros(()), jnp.zeros((), jnp.int32)
  scale = jnp.asarray(config.recipe.loss_scale or 1.0, jnp.float32)
  return Guard(no, no, zero, zero, none, jnp.ones(()), scale, none, none)


def judge(
  config: Any, guard: Guard, loss: Float[Array, ''], norms: Float[Array, ' leaves'], finite_input: Bool[Array, '']
) -> Guard:
  """The guard after a gradient: whether it may be applied, or is a fault.

  Args:
    loss: unscaled.
    norms: of the gradient's leaves.
    finite_input: of the batch.
  """
  loss, finite_loss, finite = loss.astype(jnp.float32), jnp.isfinite(loss), jnp.isfinite(norms).all()
  overflow = finite_loss & finite_input & ~finite & (guard.scale > 1)
  fault = ~(finite_loss & finite_input & (finite | overflow))
  away = loss - guard.mean
  if config.faults.spike != 'ignore':
    fault |= (guard.seen >= _WARM) & (away > config.faults.deviations * jnp.sqrt(guard.variance))
  held = guard.held | fault
  apply = ~held & ~overflow
  if config.recipe.loss_scale:
    grows = apply & (guard.since + 1 >= _GROWS_EVERY)
    halved = overflow & ~held
    scale = guard.scale * jnp.where(halved, 0.5, jnp.where(grows, 2.0, 1.0))
    since = jnp.where(halved | grows, 0, guard.since + apply)
    guard = guard._replace(scale=scale, since=since, overflows=guard.overflows + halved)
  rate = jnp.maximum(_RATE, 1 / (guard.seen + 1))
  into = lambda new, old: jnp.where(apply, new, old)  # noqa: E731
  return guard._replace(
    held=held,
    apply=apply,
    mean=into(guard.mean + rate * away, guard.mean),
    variance=into((1 - rate) * (guard.variance + rate * away**2), guard.variance),
    seen=guard.seen + apply,
    caution=into(1 + (guard.caution - 1) * _RELAX, guard.caution),
  )


def chosen(apply: Bool[Array, ''], new: PyTree, old: PyTree) -> PyTree:
  """`new` where the step is applied."""
  return jax.tree.map(lambda a, b: a if a is b else jnp.where(apply, a, b), new, old)


def norms(tree: PyTree) -> Float[Array, ' leaves']:
  """The Euclidean norm of every leaf, in float32."""
  return jnp.stack([jnp.sqrt((x.astype(jnp.float32) ** 2).sum()) for x in jax.tree.leaves(tree)])
