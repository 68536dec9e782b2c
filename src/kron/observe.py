"""Marks that state a loss's likelihood: what its outputs say about the targets, and how many observations there are.

A mark returns its outputs unchanged and may stand anywhere in the loss. The marks alone define the curvature, so the
loss itself may be weighted, regularised or have custom gradients.

A likelihood is any hashable object with the four members of `Likelihood`; `custom` takes a user-defined one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Inexact, Int, Num, PRNGKeyArray, Shaped

from ..program import observe_p
from .errors import CurvatureError
from .operators.factor import accurate

Mask = Bool[ArrayLike, '*n'] | Int[ArrayLike, '*n']
Weight = float | Float[ArrayLike, '*n']


@runtime_checkable
class Likelihood(Protocol):
  """Describes the distribution p(target | outputs) of one observation; any hashable object with these members is one.

  The last `event_ndims` axes of the outputs belong to one observation; the leading axes count observations. Let F be
  the Fisher information of one observation's outputs z. All vectors c below have the shape of the outputs.

  A likelihood may have two more methods. `prepare(outputs, *more)` gets the further arrays `more` that were given to
  the mark; `draw`, `column` and `product` then get its result in place of `outputs`. `product(outputs, u)` returns F u,
  so that products need no sum over columns.

  Attributes:
    event_ndims: the number of last axes of the outputs that belong to one observation.
  """

  event_ndims: int

  def draw(self, key: PRNGKeyArray, outputs: Inexact[Array, '...']) -> Inexact[Array, '...']:
    """Returns a random c with E[c cT] = F for each observation: the gradient of -log p at a target drawn from the model.

    It takes the random `key` and the `outputs`, (*n, *event).
    """
    ...

  def columns(self, outputs: Inexact[Array, '...']) -> int:
    """Returns the number of vectors c_k whose outer products sum to F: sum_k c_k c_kT = F, for these `outputs`."""
    ...

  def column(self, outputs: Inexact[Array, '...'], k: Int[Array, '']) -> Inexact[Array, '...']:
    """Returns the vector c_k of each observation, for the `outputs`, (*n, *event), and `k` from 0; k may be traced."""
    ...


@dataclasses.dataclass(frozen=True)
class Categorical:
  """Describes a choice of one of C classes by softmax.

  With the probabilities p, F = diag(p) - p pT has the columns sqrt(p_k) (p - e_k), where e_k is class k's unit vector.

  Attributes:
    event_ndims: the number of last axes of the outputs that belong to one observation; 1, the axis of classes.
  """

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
  """Describes independent bits with the probabilities p = sigmoid(outputs). F = diag(p (1 - p)).

  Attributes:
    event_ndims: the number of last axes of the outputs that belong to one observation.
  """

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
  """Describes independent normals of known variance. F = 1 / variance on the diagonal.

  A complex output counts as two real ones, its real and imaginary parts.

  Attributes:
    event_ndims: the number of last axes of the outputs that belong to one observation.
    variance: the variance of every target, in its unit squared; None if the mark gives one for each output.
  """

  event_ndims: int = 1
  variance: float | None = 1.0

  def prepare(self, outputs, *variance):
    """Returns 1 / standard deviation in the shape of `outputs`; `*variance` is one such array, if the mark gives one."""
    z = accurate(outputs)
    return (
      jnp.full_like(z, 1 / math.sqrt(self.variance)) if self.variance else (1 / jnp.sqrt(variance[0])).astype(z.dtype)
    )

  def draw(self, key, roots):
    if not jnp.iscomplexobj(roots):
      return jax.random.normal(key, roots.shape, roots.dtype) * roots
    parts = jax.random.normal(key, (2, *roots.shape), roots.real.dtype)
    return jax.lax.complex(parts[0], parts[1]) * roots

  def columns(self, outputs):
    return _event_size(outputs, self.event_ndims) * (2 if jnp.iscomplexobj(outputs) else 1)

  def column(self, roots, k):
    size = _event_size(roots, self.event_ndims)
    unit = _unit(roots, self.event_ndims, k % size)
    if jnp.iscomplexobj(roots):
      unit = unit * jnp.where(k < size, 1, 1j)
    return (unit * roots).astype(roots.dtype)

  def product(self, roots, u):
    return accurate(u) * roots.real**2


@dataclasses.dataclass(frozen=True)
class Loss:
  """Describes a convex loss of one observation's outputs, whose Hessian H takes the place of F.

  The curvature is then the generalised Gauss-Newton matrix. For a negative log-likelihood whose Hessian does not depend
  on the target, H is the Fisher information. `eigh` computes the root of H, without the negative eigenvalues of a loss
  that is not convex.

  Attributes:
    fn: `fn(z, *more)` returns the loss of one observation, a number; see `loss`.
    event_ndims: the number of last axes of the outputs that belong to one observation.
  """

  fn: Callable[..., Float[Array, '']]
  event_ndims: int = 1

  def prepare(self, outputs, *more):
    """Returns a root of every observation's Hessian, (*n, columns, *event); `*more` are the arrays that `fn` reads.

    The `outputs` are (*n, *event).
    """
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


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _event_size(outputs: Array, event_ndims: int) -> int:
  return math.prod(outputs.shape[outputs.ndim - event_ndims :])


def _unit(outputs: Array, event_ndims: int, k: Int[Array, '']) -> Float[Array, '...']:
  event = outputs.shape[outputs.ndim - event_ndims :]
  return jax.nn.one_hot(k, math.prod(event)).reshape(event)


def categorical(
  logits: Float[Array, '*n c'],
  labels: Int[Array, '*n'] | None = None,
  *,
  mask: Mask | None = None,
  weight: Weight = 1.0,
) -> Float[Array, '*n c']:
  """Marks softmax outputs. Each leading index of `logits` is one observation, if the mask keeps it.

  The loss is assumed to be mean(weight * l) over the observations that the mask keeps:
  sum(mask * weight * l) / sum(mask). A loss with several terms needs a mark for each, with its own count and weight.

  Args:
    logits: unnormalised log-probabilities, classes last.
    labels: the targets; only their shape is checked.
    mask: which observations count (False for padding), as booleans or integers.
    weight: the coefficient of this term in the loss, or one for each observation. If the loss divides by the sum of the
      weights, give weight / mean(weight). The empirical Fisher uses the loss's gradients, whatever weight is given.

  Returns:
    `logits`, unchanged.

  Raises:
    CurvatureError: a shape does not fit, or the mask has floating-point numbers, which may be meant as weights.
  """
  return custom(logits, Categorical(), labels, mask=mask, weight=weight, target_ndims=0)


def bernoulli(
  logits: Float[Array, '*shape'],
  targets: Num[Array, '*shape'] | None = None,
  *,
  mask: Mask | None = None,
  weight: Weight = 1.0,
  event_ndims: int = 1,
) -> Float[Array, '*shape']:
  """Marks sigmoid outputs; the last `event_ndims` axes together are one observation.

  Args:
    logits: unnormalised log-odds of independent bits.
    targets: the bits, in the shape of `logits`; only their shape is checked.
    mask: which observations count, as in `categorical`.
    weight: the coefficient of this term in the loss, as in `categorical`.
    event_ndims: the number of last axes that belong to one observation; the axes before them count observations.

  Returns:
    `logits`, unchanged.

  Raises:
    CurvatureError: a shape does not fit, or the mask has floating-point numbers.
  """
  return custom(logits, Bernoulli(event_ndims), targets, mask=mask, weight=weight, target_ndims=event_ndims)


def gaussian(
  mean: Inexact[Array, '*shape'],
  targets: Num[Array, '*shape'] | None = None,
  *,
  variance: float | Float[Array, '...'] = 1.0,
  mask: Mask | None = None,
  weight: Weight = 1.0,
  event_ndims: int = 1,
) -> Inexact[Array, '*shape']:
  """Marks regression outputs; the last `event_ndims` axes together are one observation.

  Args:
    mean: the predictions, real or complex.
    targets: the targets, in the shape of `mean`; only their shape is checked.
    variance: the variance of the targets, in their unit squared: a number, or an array that broadcasts to `mean`. It is
      1 for the loss 1/2 |mean - target|^2, and 1/2 for the loss |mean - target|^2. It must be constant: `curvature`
      refuses a learned variance.
    mask: which observations count, as in `categorical`.
    weight: the coefficient of this term in the loss, as in `categorical`.
    event_ndims: the number of last axes that belong to one observation; the axes before them count observations.

  Returns:
    `mean`, unchanged.

  Raises:
    CurvatureError: the variance is a number that is not above zero, a shape does not fit, or the mask has
      floating-point numbers.
  """
  settings = {'mask': mask, 'weight': weight, 'target_ndims': event_ndims}
  if isinstance(variance, int | float):
    if not variance > 0:
      raise CurvatureError(f'observe: variance={variance} must be above zero')
    return custom(mean, Gaussian(event_ndims, float(variance)), targets, **settings)
  mean = jnp.asarray(mean)
  if not _broadcasts(jnp.shape(variance), mean.shape):
    raise CurvatureError(f'observe: variance has shape {jnp.shape(variance)}, which does not broadcast to {mean.shape}')
  variance = jnp.broadcast_to(jnp.asarray(variance, jnp.finfo(mean.dtype).dtype), mean.shape)
  return custom(mean, Gaussian(event_ndims, None), targets, more=(variance,), **settings)


def loss(
  outputs: Inexact[Array, '*shape'],
  fn: Callable[..., Float[Array, '']],
  *more: Shaped[Array, '...'],
  mask: Mask | None = None,
  weight: Weight = 1.0,
  event_ndims: int = 1,
) -> Inexact[Array, '*shape']:
  """Marks outputs by the loss of one observation, a JAX function whose Hessian becomes the curvature (the GGN).

  Args:
    outputs: the outputs; the last `event_ndims` axes together are one observation.
    fn: `fn(z, *more)` returns the loss of one observation, a number. The sum over observations is the whole loss, up to
      a factor. Pass the same function object at every call, or JAX compiles again.
    *more: other arrays that `fn` reads, such as targets, with the same leading axes.
    mask: which observations count, as in `categorical`.
    weight: the coefficient of this term in the loss, as in `categorical`.
    event_ndims: the number of last axes that belong to one observation; the axes before them count observations.

  Returns:
    `outputs`, unchanged.

  Raises:
    CurvatureError: a shape does not fit, or the mask has floating-point numbers.

  References:
    Schraudolph, 2002 (Fast curvature matrix-vector products), section 3; Martens, 2020 (arXiv:1412.1193), section 8.
  """
  leading = jnp.shape(outputs)[: jnp.ndim(outputs) - event_ndims]
  for x in more:
    if jnp.shape(x)[: len(leading)] != leading:
      raise CurvatureError(
        f'observe: an argument of the loss has shape {jnp.shape(x)}, the outputs lead with {leading}'
      )
  return custom(outputs, Loss(fn, event_ndims), mask=mask, weight=weight, more=more)


def custom(
  outputs: Inexact[Array, '*shape'],
  likelihood: Likelihood,
  targets: Shaped[Array, '...'] | None = None,
  *,
  more: Sequence[Shaped[Array, '...']] = (),
  mask: Mask | None = None,
  weight: Weight = 1.0,
  target_ndims: int | None = None,
) -> Inexact[Array, '*shape']:
  """Marks outputs by a user-defined likelihood.

  Args:
    outputs: the outputs; the last `likelihood.event_ndims` axes together are one observation.
    likelihood: any object of the protocol `Likelihood`.
    targets: the targets; only their shape is checked, and only if `target_ndims` is given.
    more: other arrays that the likelihood's `prepare` reads.
    mask: which observations count, as in `categorical`.
    weight: the coefficient of this term in the loss, as in `categorical`.
    target_ndims: the number of last axes of the outputs that the targets have too, behind the axes that count
      observations; 0 for one number for each observation. None checks nothing.

  Returns:
    `outputs`, unchanged.

  Raises:
    CurvatureError: a shape does not fit, the outputs have fewer axes than one observation, or the mask has
      floating-point numbers.
  """
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
        f'observe: targets have shape {jnp.shape(targets)}, outputs of shape {outputs.shape} need {expected}'
      )
  more = tuple(jnp.asarray(x) for x in more)
  masks = () if mask is None else (_checked_mask(mask, leading, outputs),)
  plain = isinstance(weight, int | float) and weight == 1
  weights = () if plain else (_checked_weight(weight, leading, outputs),)
  settings = {'likelihood': likelihood, 'masked': mask is not None, 'weighted': not plain}
  return observe_p.bind(outputs, *masks, *weights, *more, **settings)


def _checked_mask(mask: ArrayLike, leading: tuple[int, ...], outputs: Array) -> Float[Array, '*n']:
  mask = jnp.asarray(mask)
  if mask.shape != leading:
    raise CurvatureError(f'observe: mask has shape {mask.shape}, outputs of shape {outputs.shape} need {leading}')
  if jnp.issubdtype(mask.dtype, jnp.inexact):
    raise CurvatureError(
      f'observe: mask has type {mask.dtype} and may be meant as weights; give mask=mask > 0 for observations that count '
      'or not, weight=w for a loss mean(w * l), weight=w / w.mean() for sum(w * l) / sum(w)'
    )
  return (mask != 0).astype(jnp.float32)


def _checked_weight(weight: Any, leading: tuple[int, ...], outputs: Array) -> Float[Array, '...']:
  weight = jnp.asarray(weight, jnp.float32)
  if weight.shape not in ((), leading):
    raise CurvatureError(
      f'observe: weight has shape {weight.shape}; give one number, or for outputs of shape {outputs.shape} {leading}'
    )
  return weight
