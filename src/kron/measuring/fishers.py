"""Sums the statistics of the cotangents that make the exact Fisher, and finds the key for random draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ...program import Program, Ref, draws_from
from ..errors import CurvatureError
from ..statistics import degree
from .observations import Observed

_SAMPLING = 0x6B726F6E  # folded into the user's key, so that labels and dropout masks are drawn independently


def exact(
  statistics_from: Callable, observed: Sequence[Observed], share: Sequence[Any], keys: Sequence[PRNGKeyArray]
) -> Any:
  """Computes the statistics of the exact Fisher from the columns of every likelihood's root.

  Statistics of degree 2 are summed over all columns; those of degree 0 are taken once. Each observation's column gets a
  random sign, which cancels in the outer product of that observation with itself. If the network couples observations,
  as batch normalisation does, the signs make the products between observations vanish on average.
  """
  nothing = [jnp.zeros_like(o.outputs) for o in observed]
  total = statistics_from(nothing)
  for i, (o, key) in enumerate(zip(observed, keys, strict=True)):
    read = o.prepared()

    def add(sums, k, i=i, o=o, key=key, read=read):
      signs = jax.random.rademacher(jax.random.fold_in(jax.random.fold_in(key, i), k), o.leading, jnp.float32)
      column = o.scaled(o.likelihood.column(read, k) * o.expanded(signs), share[i])
      parts = statistics_from([column if j == i else zeros for j, zeros in enumerate(nothing)])
      add = lambda name, s, new: s + new if degree(name) else s  # noqa: E731
      return {
        block: block_sums._replace(
          products={k: add(k, s, parts[block].products[k]) for k, s in block_sums.products.items()}
        )
        for block, block_sums in sums.items()
      }, None

    total, _ = jax.lax.scan(add, total, jnp.arange(o.likelihood.columns(o.outputs)))
  return total


def random_key(key: PRNGKeyArray | None, args: tuple, program: Program, otherwise: int | None = None) -> PRNGKeyArray:
  """Returns the given key, else one derived from the only key among the loss's arguments, else one from a seed.

  Two numbers of type uint32 count as a key if the loss draws from them. Counters among the arguments, which are scalar
  integers, are folded into the key, because random state may be a key that stays and a count that grows (flax.nnx).
  """
  if key is not None:
    return key
  leaves = jax.tree.leaves(args)
  inputs = program.inputs[len(program.inputs) - len(leaves) :]
  keys = [leaf for leaf, ref in zip(leaves, inputs, strict=True) if _is_key(leaf, ref, program)]
  if len(keys) == 1:
    counts = [leaf for leaf in leaves if jnp.shape(leaf) == () and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)]
    return functools.reduce(jax.random.fold_in, counts, jax.random.fold_in(keys[0], _SAMPLING))
  if otherwise is not None:
    return jax.random.key(otherwise)
  raise CurvatureError(
    f"fisher='sampled' draws targets: pass key= to value_and_grad (the loss's arguments hold {len(keys)} PRNG keys)"
  )


def _is_key(leaf: Any, ref: Ref, program: Program) -> bool:
  if not hasattr(leaf, 'dtype'):
    return False
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf.shape == ()
  return leaf.dtype == jnp.uint32 and leaf.shape == (2,) and draws_from(program, ref)
