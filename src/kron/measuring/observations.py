"""Counts the observations of each mark, and finds the share of each observation in the curvature.

The loss is assumed to be a sum of terms, one for each mark. Each term is a mean over the n observations of its mark.
Let c_o be a root of the Fisher information of observation o. The curvature is then the sum over marks of
1/n sum_o weight_o J^T c_o c_o^T J. All statistics are divided by one number, the largest n. The observations of a mark
that has fewer observations therefore get larger shares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ...program import Op, Operand, varying
from ..errors import CurvatureError
from ..observe import Likelihood
from .shards import WHOLE, Shards

Number = int | Array


class Observed(NamedTuple):
  """The outputs of one mark, its mask and weight if it has them, and the other arrays that its likelihood reads."""

  likelihood: Likelihood
  outputs: Array
  mask: Array | None
  weight: Array | None
  more: tuple[Array, ...]

  @classmethod
  def of(cls, mark: Op, outputs: Array, extra: Sequence[Operand]) -> Observed:
    """Makes the observed outputs from the operands of a mark."""
    rest = list(extra)
    mask = rest.pop(0) if mark.params['masked'] else None
    weight = rest.pop(0) if mark.params['weighted'] else None
    return cls(mark.params['likelihood'], outputs, mask, weight, tuple(rest))

  @property
  def leading(self) -> tuple[int, ...]:
    return self.outputs.shape[: self.outputs.ndim - self.likelihood.event_ndims]

  def prepared(self) -> Array:
    """Returns the outputs in the form that the likelihood reads."""
    prepare = getattr(self.likelihood, 'prepare', None)
    return self.outputs if prepare is None else prepare(self.outputs, *self.more)

  def number(
    self, shards: Shards = WHOLE, axes: frozenset[str] = frozenset(), averaged: frozenset[str] = frozenset()
  ) -> Number:
    """Returns how many observations count, among those that statistics are taken from.

    axes: mesh axes of a shard_map around the whole computation, over which observations are counted together.
    averaged: mesh axes over which the caller sums statistics, so that each device counts its share of all observations.
    """
    if self.mask is None:
      sizes = math.prod(jax.lax.axis_size(a) for a in axes)
      return round(math.prod(self.leading) * shards.subsample) * sizes
    count = self.mask.sum() if shards.subsample == 1 else shards.cut(self.mask, 0).sum()
    if averaged:
      count = jax.lax.pmean(jnp.asarray(count, jnp.float32), tuple(sorted(averaged)))
    apart = tuple(sorted(axes & varying(count)))
    same = math.prod(jax.lax.axis_size(a) for a in axes - set(apart))
    return (jax.lax.psum(count, apart) if apart else count) * same

  def scaled(self, cotangent: Array, share: float | Array) -> Array:
    """Multiplies a cotangent by the root of each observation's share, so that its outer product counts by the share."""
    factor = jnp.sqrt(jnp.asarray(share, cotangent.real.dtype))
    for x in (self.mask, self.weight):
      if x is not None:
        factor = factor * jnp.sqrt(self.expanded(x).astype(factor.dtype))
    return (cotangent * factor).astype(self.outputs.dtype)

  def times_share(self, u: Array, share: float | Array) -> Array:
    """Multiplies F u, the product of the Fisher information with a vector, by each observation's share."""
    factor = jnp.asarray(share, u.real.dtype)
    for x in (self.mask, self.weight):
      factor = factor if x is None else factor * self.expanded(x)
    return u * factor.astype(u.dtype)

  def expanded(self, x: Operand) -> Operand:
    """Reshapes numbers for the observations (or for their first axes) so that they broadcast with the outputs."""
    return x.reshape(*x.shape, *(1,) * (self.outputs.ndim - x.ndim)) if x.ndim else x


def largest(numbers: Sequence[Number]) -> Number:
  """Returns the largest of some numbers, as a static number if all of them are static."""
  if all(isinstance(n, int) for n in numbers):
    return max(numbers)
  return functools.reduce(jnp.maximum, [jnp.asarray(n, jnp.float32) for n in numbers])


def shares(numbers: Sequence[Number]) -> list[Number | Array]:
  """Returns largest(numbers) / number for each mark: 1 if all are the same, and 0 for a mark without observations."""
  if len(numbers) == 1 or (
    len({n if isinstance(n, int) else None for n in numbers}) == 1 and isinstance(numbers[0], int)
  ):
    return [1] * len(numbers)
  most = largest(numbers)
  return [jnp.where(n > 0, most / positive(n), 0) for n in numbers]


def positive(number: Number) -> Number | Array:
  """Returns a number for use as a divisor: the number itself, or 1 if it is 0.

  The number may be less than one, because it may be a device's share of all observations.
  """
  return max(number, 1) if isinstance(number, int) else jnp.where(number > 0, number, 1)


def check_marks(marks: Sequence[tuple[Op, int, int]], counted: bool) -> None:
  """Refuses marks that count observations in a way that cannot match their losses.

  Args:
    marks: the marks, each with the number of loops around it and the number of times that it runs.
    counted: whether the caller gives the number of observations.

  Raises:
    CurvatureError: a mark outside of loops has no axis of observations, as its event takes every axis; or `examples=`
      is given, but the marks have different numbers of observations.
  """
  sizes = []
  for mark, depth, times in marks:
    shape, ndims = mark.outputs[0].shape, mark.params['likelihood'].event_ndims
    if len(shape) == ndims and not depth:
      raise CurvatureError(
        f'observe: outputs of shape {shape} would be one observation of {math.prod(shape)} numbers; for one number of '
        f'each example set event_ndims={max(ndims - 1, 0)} or mark outputs[..., None], for a single example outputs[None]'
      )
    sizes.append(math.prod(shape[: len(shape) - ndims]) * times)
  if counted and len(set(sizes)) > 1:
    raise CurvatureError(
      f'examples= is one number, but the marks have {" and ".join(map(str, sorted(set(sizes))))} observations; leave it '
      'out where each term is the mean over its own, and give a mark weight= where its term has another coefficient'
    )
