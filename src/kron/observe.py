"""Marks that tell a loss's likelihood: what its outputs say about the targets, and how many observations there are.

A mark returns its outputs unchanged and may stand anywhere in the loss. Curvature is defined by the marks alone, so the
loss itself may be weighted, regularised or have gradients of its own.

A likelihood is any hashable object with the four members of `Likelihood`; `custom` takes one of the user's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from ..program import observe_p
from .errors import CurvatureError
from .operators.factor import accurate


class Likelihood(Protocol):
  """p(target | outputs) of one observation; outputs have `event_ndims` trailing axes, the leading ones count observations.

  With F the Fisher information of one observation's outputs z, `draw` returns a random c with E[c cT] = F (the gradient
  of -log p at a target drawn from the model), and the `columns` vectors `column(outputs, k)` satisfy sum_k c_k c_kT = F.
  All are shaped like `outputs`. A likelihood with a method `prepare(outputs, *more)`, where `more` are further arrays given
  to the mark, gets its result in place of `outputs` in `draw` and `column`. A method `product(outputs, u)` -> F u spares
  the sum over columns where products are asked for.
  """

  event_ndims: int

  def draw(self, key: PRNGKeyArray, outputs: Array) -> Array: ...

  def columns(self, outputs: Array) -> int: ...

  def column(self, outputs: Array, k: Int[Array, '']) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Categorical:
  """One of C classes by softmax. F = diag(p) - p pT, its columns sqrt(p_k) (p - e_k)."""

  event_ndims: int = 1

  def draw(self, key, outputs):
    logits = accurate(outputs)
    label = jax.random.categorical(key, logits)
    return jax.nn.softmax(logits) - jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)

  def columns(self, outputs):
    return outputs.shape[-1]

  def column(self, outputs, k):
    p = jax.nn.softmax(accurate(outputs))
    return jnp.sqrt(p[..., k])[..., None] * (p - jax.nn.one_hot(k, p.shape[-1], dtype=p.dtype))

  def product(self, outputs, u):
    p = jax.nn.softmax(accurate(outputs))
    return p * (u - (p * u).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Bernoulli:
  """Independent bits by sigmoid. F = diag(p (1 - p))."""

  event_ndims: int = 1

  def draw(self, key, outputs):
    p = jax.nn.sigmoid(accurate(outputs))
    return p - jax.random.bernoulli(key, p).astype(p.dtype)

  def columns(self, outputs):
    return _event_size(outputs, self.event_ndims)

  def column(self, outputs, k):
    p = jax.nn.sigmoid(accurate(outputs))
    return jnp.sqrt(p * (1 - p)) * _unit(outputs, self.event_ndims, k).astype(p.dtype)

  def product(self, outputs, u):
    p = jax.nn.sigmoid(accurate(outputs))
    return p * (1 - p) * u


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Independent normals of one known variance. F = I / variance."""

  event_ndims: int = 1
  variance: float = 1.0

  def draw(self, key, outputs):
    z = accurate(outputs)
    if not jnp.iscomplexobj(z):
      return jax.random.normal(key, z.shape, z.dtype) / math.sqrt(self.variance)
    parts = jax.random.normal(key, (2, *z.shape), z.real.dtype) / math.sqrt(self.variance)
    return jax.lax.complex(parts[0], parts[1])

  def columns(self, outputs):
    return _event_size(outputs, self.event_ndims) * (2 if jnp.iscomplexobj(outputs) else 1)

  def column(self, outputs, k):
    size = _event_size(outputs, self.event_ndims)
    unit = _unit(outputs, self.event_ndims, k % size) / math.sqrt(self.variance)
    if jnp.iscomplexobj(outputs):
      unit = unit * jnp.where(k < size, 1, 1j)
    return jnp.broadcast_to(unit, outputs.shape).astype(accurate(outputs).dtype)

  def product(self, outputs, u):
    return accurate(u) / self.variance


@dataclasses.dataclass(frozen=True)
class Loss:
  """What a convex loss of one observation's outputs says: its Hessian H in place of F (the generalised Gauss-Newton).

  Of a negative log-likelihood whose Hessian does not depend on the target, that is the Fisher information. The root of H
  is had by `eigh`; what a loss that is not convex has below zero is left out.
  """

  fn: Callable[..., Array]
  event_ndims: int = 1

  def prepare(self, outputs, *more):
    """A root of every observation's Hessian: (*leading, columns, *event)."""
    z = accurate(outputs)
    leading, event = z.shape[: z.ndim - self.event_ndims], z.shape[z.ndim - self.event_ndims :]
    n = math.prod(event)

    def root(z, *more):
      hessian = jax.hessian(lambda flat: self.fn(flat.reshape(event), *more))(z.reshape(-1))
      values, vectors = jnp.linalg.eigh(hessian)
      return (jnp.sqrt(jnp.maximum(values, 0)) * vectors).T

    flat = [x.reshape(-1, *x.shape[len(leading) :]) for x in (z, *more)]
    return jax.vmap(root)(*flat).reshape(*leading, n, *event)

  def draw(self, key, root):
    axis = root.ndim - self.event_ndims - 1
    signs = jax.random.rademacher(key, root.shape[: axis + 1], root.dtype)
    return (root * signs.reshape(*signs.shape, *(1,) * self.event_ndims)).sum(axis)

  def columns(self, outputs):
    return _event_size(outputs, self.event_ndims)

  def column(self, root, k):
    return jnp.take(root, k, axis=root.ndim - self.event_ndims - 1)

  def product(self, root, u):
    axis = root.ndim - self.event_ndims - 1
    along = (root * jnp.expand_dims(u, axis)).sum(tuple(range(axis + 1, root.ndim)), keepdims=True)
    return (root * along).sum(axis)


def _event_size(outputs: Array, event_ndims: int) -> int:
  return math.prod(outputs.shape[outputs.ndim - event_ndims :])


def _unit(outputs: Array, event_ndims: int, k: Int[Array, '']) -> Float[Array, '...']:
  event = outputs.shape[outputs.ndim - event_ndims :]
  return jax.nn.one_hot(k, math.prod(event)).reshape(event)


def categorical(
  logits: Float[Array, '*n c'], labels: Int[Array, '*n'] | None = None, *, mask: Num[Array, '*n'] | None = None
) -> Float[Array, '*n c']:
  """Marks softmax outputs: one observation for each leading index of `logits`, or sum(mask) of them.

  Args:
    logits: unnormalised log-probabilities, classes last.
    labels: the targets, checked for their shape only.
    mask: weight of each observation, 0 for padding.

  Returns:
    `logits`, unchanged.

  Raises:
    CurvatureError: a shape does not fit.
  """
  return custom(logits, Categorical(), labels, mask=mask, target_ndims=0)


def bernoulli(
  logits: Float[Array, '*n d'],
  targets: Num[Array, '*n d'] | None = None,
  *,
  mask: Num[Array, '*n'] | None = None,
  event_ndims: int = 1,
) -> Float[Array, '*n d']:
  """Marks sigmoid outputs; the last `event_ndims` axes together are one observation. Otherwise as `categorical`."""
  return custom(logits, Bernoulli(event_ndims), targets, mask=mask, target_ndims=event_ndims)


def gaussian(
  mean: Float[Array, '*n d'],
  targets: Num[Array, '*n d'] | None = None,
  *,
  variance: float = 1.0,
  mask: Num[Array, '*n'] | None = None,
  event_ndims: int = 1,
) -> Float[Array, '*n d']:
  """Marks regression outputs; the last `event_ndims` axes together are one observation. Otherwise as `categorical`.

  variance: of the targets, in their unit squared. 1 belongs to the loss 1/2 |mean - target|^2, 1/2 to |mean - target|^2.
  """
  return custom(mean, Gaussian(event_ndims, variance), targets, mask=mask, target_ndims=event_ndims)


def loss(
  outputs: Float[Array, '*n ...'],
  fn: Callable[..., Float[Array, '']],
  *more: Num[Array, '*n ...'],
  mask: Num[Array, '*n'] | None = None,
  event_ndims: int = 1,
) -> Float[Array, '*n ...']:
  """Marks outputs by their loss, a JAX function of one observation: curvature is its Hessian (the GGN).

  Args:
    outputs: the last `event_ndims` axes together are one observation.
    fn: `fn(z, *more)` -> a number, for one observation; the sum over observations is the loss, up to its scale. Give the
      same function object at every call, or JAX compiles anew.
    *more: what else it reads, such as targets: arrays with the same leading axes.
    mask: as in `categorical`.

  References:
    Schraudolph, 2002 (Fast curvature matrix-vector products), section 3; Martens, 2020 (arXiv:1412.1193), section 8.
  """
  leading = jnp.shape(outputs)[: jnp.ndim(outputs) - event_ndims]
  for x in more:
    if jnp.shape(x)[: len(leading)] != leading:
      raise CurvatureError(
        f'observe: an argument of the loss has shape {jnp.shape(x)}, the outputs lead with {leading}'
      )
  return custom(outputs, Loss(fn, event_ndims), mask=mask, more=more)


def custom(
  outputs: Float[Array, '*n ...'],
  likelihood: Likelihood,
  targets: Num[Array, '*n ...'] | None = None,
  *,
  more: Sequence[Num[Array, '*n ...']] = (),
  mask: Num[Array, '*n'] | None = None,
  target_ndims: int | None = None,
) -> Float[Array, '*n ...']:
  """Marks outputs by a likelihood of the user's own (see `Likelihood`). Otherwise as `categorical`."""
  outputs = jnp.asarray(outputs)
  leading = outputs.shape[: outputs.ndim - likelihood.event_ndims]
  if outputs.ndim < likelihood.event_ndims:
    raise CurvatureError(
      f'observe: outputs of shape {outputs.shape} have fewer axes than one observation ({likelihood.event_ndims}); '
      'set event_ndims'
    )
  if targets is not None and target_ndims is not None:
    expected = leading + outputs.shape[outputs.ndim - target_ndims :] if target_ndims else leading
    if jnp.shape(targets) != expected:
      raise CurvatureError(
        f'observe: targets have shape {jnp.shape(targets)}, outputs of shape {outputs.shape} want {expected}'
      )
  more = tuple(jnp.asarray(x) for x in more)
  if mask is None:
    return observe_p.bind(outputs, *more, likelihood=likelihood, weighted=False)
  if jnp.shape(mask) != leading:
    raise CurvatureError(f'observe: mask has shape {jnp.shape(mask)}, outputs of shape {outputs.shape} want {leading}')
  return observe_p.bind(outputs, jnp.asarray(mask, jnp.float32), *more, likelihood=likelihood, weighted=True)
