"""Which cotangents of the observed outputs make the Fisher information, and how their sums are put together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .errors import CurvatureError
from .statistics import degree

_SAMPLING = 0x6B726F6E  # folded into the user's key, so that labels are drawn apart from dropout masks


def prepared(likelihoods, outputs, weights, extras) -> list[Array]:
  """What likelihoods read of the outputs; `extras` are the marks' further operands, `weights` the masks among them."""
  return [
    p.prepare(z, *extra[len(weight) :]) if hasattr(p, 'prepare') else z
    for p, z, weight, extra in zip(likelihoods, outputs, weights, extras, strict=True)
  ]


def weighted(cotangents, outputs, weights, likelihoods) -> list[Array]:
  """Each observation's share: its Fisher information counts by its weight, a cotangent by the weight's root."""
  result = []
  for c, z, weight, p in zip(cotangents, outputs, weights, likelihoods, strict=True):
    if weight:
      c = c * jnp.sqrt(weight[0]).reshape(*weight[0].shape, *(1,) * p.event_ndims)
    result.append(c.astype(z.dtype))
  return result


def exact(statistics_from, marked, weights, key) -> Any:
  """Sums the statistics of degree 2 over all columns of every likelihood's root; those of degree 0 are taken once.

  Each observation's column gets a random sign. It cancels in that observation's own outer product, and makes the
  products between observations vanish on average where the network couples them, as batch normalisation does.
  """
  outputs = [z for _, z, _ in marked]
  likelihoods = [likelihood for likelihood, *_ in marked]
  nothing = [jnp.zeros_like(z) for z in outputs]
  total = statistics_from(nothing)
  for i, (likelihood, z, observed) in enumerate(marked):

    def add(sums, k, i=i, likelihood=likelihood, z=z, observed=observed):
      leading = z.shape[: z.ndim - likelihood.event_ndims]
      signs = jax.random.rademacher(jax.random.fold_in(jax.random.fold_in(key, i), k), leading, jnp.float32)
      column = likelihood.column(observed, k) * signs.reshape(*leading, *(1,) * likelihood.event_ndims)
      cotangents = [column if j == i else zeros for j, zeros in enumerate(nothing)]
      parts = statistics_from(weighted(cotangents, outputs, weights, likelihoods))
      return {
        block: {name: s + parts[block][name] if degree(name) else s for name, s in factors.items()}
        for block, factors in sums.items()
      }, None

    total, _ = jax.lax.scan(add, total, jnp.arange(likelihood.columns(z)))
  return total


def random_key(key: PRNGKeyArray | None, args: tuple, otherwise: int | None = None) -> PRNGKeyArray:
  """The key given, or one folded out of the only key among the loss's arguments, or one from a seed."""
  if key is not None:
    return key
  keys = [leaf for leaf in jax.tree.leaves(args) if _is_key(leaf)]
  if len(keys) == 1:
    return jax.random.fold_in(keys[0], _SAMPLING)
  if otherwise is not None:
    return jax.random.key(otherwise)
  raise CurvatureError(
    f"fisher='sampled' draws targets: pass key= to value_and_grad (the loss's arguments hold {len(keys)} PRNG keys)"
  )


def _is_key(leaf: Any) -> bool:
  if not hasattr(leaf, 'dtype'):
    return False
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf.shape == ()
  return leaf.dtype == jnp.uint32 and leaf.shape == (2,)
