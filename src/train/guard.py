"""Protection of a run on the device: a step that is not sound changes nothing, and the steps after it wait.

The host looks at the metrics of several steps at once. Until it has looked and decided what a fault means
(`faults.py`), the state stays as it was before the fault. The step can then be examined, skipped or done differently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .errors import ConfigError

POLICIES = ('stop', 'skip', 'damp', 'rollback')
_WARM = 20  # losses that come before the first one that may be called a spike
_RATE = 0.05  # the rate of the moving mean and variance of the loss
_RELAX = 0.99  # the factor by which raised damping relaxes at every step
_GROWS_EVERY = 2000  # steps without an overflow before the loss scale doubles (Micikevicius et al. 2018, section 3.2)


class Guard(NamedTuple):
  """The guard's state on the device.

  held: whether a fault waits for the host. apply: whether the last gradient is sound.
  mean, variance, seen: the mean, variance and number of the accepted losses.
  caution: the factor by which the damping is multiplied.
  scale, since, overflows: the loss scale, the number of steps since it changed, and how often it was too large.
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
  """Raises ConfigError for a fault policy that is unknown or does not work with this config."""
  settings = config.faults
  for name, more in (('not_finite', ()), ('spike', ('ignore',))):
    if settings[name] not in (*POLICIES, *more):
      raise ConfigError(
        f'config.faults.{name}={settings[name]!r} is unknown; choose from {", ".join((*POLICIES, *more))}'
      )
    if settings[name] == 'damp' and config.optimizer != 'kfac':
      raise ConfigError(f"config.faults.{name}='damp' raises K-FAC's damping; config.optimizer={config.optimizer!r}")
    if settings[name] == 'rollback' and not config.keep_checkpoints:
      raise ConfigError(f"config.faults.{name}='rollback' needs checkpoints; config.keep_checkpoints=0 writes none")


def new_guard(config: Any) -> Guard:
  no, zero, none = jnp.zeros((), bool), jnp.zeros(()), jnp.zeros((), jnp.int32)
  scale = jnp.asarray(config.recipe.loss_scale or 1.0, jnp.float32)
  return Guard(no, no, zero, zero, none, jnp.ones(()), scale, none, none)


def assess(
  config: Any, guard: Guard, loss: Float[Array, ''], norms: Float[Array, ' leaves'], finite_input: Bool[Array, '']
) -> Guard:
  """Returns the guard after a gradient, which may be applied or is a fault.

  Args:
    loss: the unscaled loss.
    norms: the norms of the gradient's leaves.
    finite_input: whether the batch is finite.
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
  """Returns `new` if the step is applied, else `old`."""
  return jax.tree.map(lambda a, b: a if a is b else jnp.where(apply, a, b), new, old)


def norms(tree: PyTree) -> Float[Array, ' leaves']:
  """Returns the Euclidean norm of every leaf, in float32."""
  return jnp.stack([jnp.sqrt((x.astype(jnp.float32) ** 2).sum()) for x in jax.tree.leaves(tree)])
