"""Functions run again operation by operation, so that a caller can look at the marks on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex
from jaxtyping import Array

from .marks import observe_p


def visiting(fn: Callable, visit: Callable[[Array, dict[str, Any]], None]) -> Callable:
  """Returns `fn` with `visit(outputs, the mark's parameters)` called wherever it marks outputs by `kron.observe`.

  Operations stay as they are, nested calls included; a mark inside a nested call is not visited.
  """

  @functools.wraps(fn)
  def visited(*args):
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, jax.tree.leaves(args), strict=True))
    read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]  # noqa: E731
    for eqn in closed.jaxpr.eqns:
      values = [read(v) for v in eqn.invars]
      results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
      env.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))
      if eqn.primitive is observe_p:
        visit(values[0], dict(eqn.params))
    return jax.tree.unflatten(jax.tree.structure(shape), [read(v) for v in closed.jaxpr.outvars])

  return visited
