"""Curvature times a vector, without forming the matrix: Hessian, generalised Gauss-Newton and Fisher information.

All three cover the whole network, not single blocks. A product costs about two gradients, a quadratic form half that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .errors import CurvatureError
from .operators.factor import accurate
from .param_trees import Parameters, match


class Products(NamedTuple):
  """Holds the curvature of a loss at one point, as functions of trees shaped like the parameters.

  Attributes:
    hessian: $H v$ of the loss, regularisers included.
    gauss_newton: $J^T H_z J v$, with J the jacobian of the marked outputs z and H_z the loss's Hessian in z.
    fisher: $J^T F_z J v$ as a mean over observations. F_z is the Fisher information of an observation's outputs: that
      of the likelihood (fisher='exact'), or $c c^T$. The vector c is the gradient at a drawn target ('sampled'), or the
      gradient of the loss itself ('empirical').
    forms: $u^T F v$ for all pairs from a sequence of k trees, by forward passes alone: (k, k).

  For a loss without marks, all but `hessian` raise CurvatureError.

  References:
    Pearlmutter, 1994 (Fast exact multiplication by the Hessian); Schraudolph, 2002 (Fast curvature matrix-vector
    products); Martens, 2020 (arXiv:1412.1193), sections 8 and 11.
  """

  hessian: Callable[[PyTree], PyTree]
  gauss_newton: Callable[[PyTree], PyTree]
  fisher: Callable[[PyTree], PyTree]
  forms: Callable[[Sequence[PyTree]], Float[Array, 'k k']]


class Outputs(NamedTuple):
  """The marked outputs of a loss as a function of its parameters, with their information and the loss they lead to.

  function: leaves -> outputs, one array for each mark.
  information: (one array for each mark) -> F_z times it, each divided by its mark's number of observations.
  tail: offsets added to the outputs -> the loss.
  """

  function: Callable[[list[Array]], list[Array]]
  information: Callable[[list[Array]], list[Array]]
  tail: Callable[[list[Array]], Array]


def make_products(loss: Callable[[PyTree], Array], params: PyTree, outputs: Outputs | None) -> Products:
  """Makes the products of a loss (parameters -> number); without marked outputs, only the Hessian is available."""
  leaves, parameters = jax.tree.leaves(params), Parameters.of(params)

  def hessian(v):
    primals = jax.tree.map(lambda x, p: x.astype(p.dtype), v, params)
    return jax.tree.map(lambda r, x: r.astype(x.dtype), jax.jvp(jax.grad(loss), (params,), (primals,))[1], v)

  if outputs is None:
    return Products(hessian, _unmarked, _unmarked, _unmarked)
  z, pull = jax.vjp(outputs.function, leaves)
  # The pullback is transposed because functions with custom derivative rules have no other forward mode.
  transpose = jax.linear_transpose(lambda c: pull(c)[0], z)

  def push(v: PyTree) -> list[Array]:
    tangents = match(v, parameters).leaves
    # Masked parameters do not move.
    along = [
      tangents.get(name, jnp.zeros_like(p)).astype(p.dtype) for name, p in zip(parameters.names, leaves, strict=True)
    ]
    return transpose(along)[0]

  def back(cotangents: Sequence[Array], v: PyTree) -> PyTree:
    result = pull([c.astype(x.dtype) for c, x in zip(cotangents, z, strict=True)])[0]
    tree = match(v, parameters)
    named = dict(zip(parameters.names, result, strict=True))
    return tree.rebuilt({name: named[name].astype(x.dtype) for name, x in tree.leaves.items()})

  def gauss_newton(v):
    nothing = [jnp.zeros_like(x) for x in z]
    return back(jax.jvp(jax.grad(outputs.tail), (nothing,), (push(v),))[1], v)

  def fisher(v):
    return back(outputs.information(push(v)), v)

  def forms(vectors):
    along = [push(v) for v in vectors]
    images = [outputs.information(u) for u in along]
    inner = lambda a, b: sum(jnp.sum((accurate(x).conj() * accurate(y)).real) for x, y in zip(a, b, strict=True))  # noqa: E731
    # One triangle is computed and mirrored: the form is symmetric.
    k = len(vectors)
    upper = {(i, j): inner(along[i], images[j]) for i in range(k) for j in range(i, k)}
    rows = [jnp.stack([upper[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)]
    return jnp.stack(rows)

  return Products(hessian, gauss_newton, fisher, forms)


def _unmarked(v: Any) -> Any:
  del v
  raise CurvatureError('only the Hessian is available for this loss; mark its outputs by kron.observe')


def information_product(likelihood: Any, observed: Array, u: Array) -> Array:
  """Returns F_z u for every observation, by the likelihood's `product` if it has one, else column by column."""
  if hasattr(likelihood, 'product'):
    return likelihood.product(observed, u)
  axes = tuple(range(u.ndim - likelihood.event_ndims, u.ndim))

  def add(total, k):
    c = likelihood.column(observed, k)
    return total + c * (c.conj() * u).real.sum(axes, keepdims=True).astype(total.dtype), None

  start = jnp.zeros_like(accurate(u))
  return jax.lax.scan(add, start, jnp.arange(likelihood.columns(u)))[0]


def rank_one_product(c: Array, u: Array, event_ndims: int) -> Array:
  """Returns c cT u for every observation."""
  axes = tuple(range(u.ndim - event_ndims, u.ndim))
  return c * (c.conj() * accurate(u)).real.sum(axes, keepdims=True).astype(c.dtype)
