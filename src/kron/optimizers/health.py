"""Condition numbers of a running optimiser's factors, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..operators.factor import accurate
from ..placing import Local, Placement
from ..state.inverse import slot_damping
from ..state.stacks import Stack
from .precondition import find_state

_ITERATIONS = 30


class Health(NamedTuple):
  """Describes the condition of one factor, with one number for each of its matrices.

  Attributes:
    largest: the largest eigenvalue of the factor.
    damping: the number added to its diagonal.
    condition: the condition number of the damped factor at its last inversion: its largest eigenvalue times the
      inverse's.
  """

  largest: Float[Array, ' slots']
  damping: Float[Array, ' slots']
  condition: Float[Array, ' slots']


def health(
  state: Any, damping: float | Float[Array, ''], placement: Placement | None = None
) -> dict[str, dict[str, Health]]:
  """Returns the health of every factor, by the names of block and factor.

  It finds the eigenvalues by 30 steps of the power method, on the devices that hold the matrices (Golub and Van Loan
  2013, section 7.3.1). They come out a little too small where the largest ones lie close together.

  Args:
    state: an optax state that contains a `scale_by_kfac` state.
    damping: lambda, the value now in use.
    placement: the placement that the optimiser was made with; None for one owner.

  Returns:
    block -> factor -> `Health`, whose numbers have shape (slots,): one for each matrix of the factor.

  Raises:
    CurvatureError: there is no such state, or there are several.
  """
  placement = placement or Local()
  kfac = find_state(state)
  means = kfac.averages.means()
  layout = kfac.averages.factors.layout
  added = slot_damping(layout, means, jnp.asarray(damping), placement.replicate)
  of_factors = {name: _largest(stack, means[name]) for name, stack in layout.stacks.items()}
  of_inverses = {name: _largest(stack, kfac.inverses[name]) for name, stack in layout.stacks.items()}

  def read(numbers: dict[str, Array], block: str, factor: str) -> Float[Array, ' slots']:
    name, index = layout.places[block, factor]
    if numbers[name].ndim == 1:  # in the order of the factors
      start = layout.starts[block, factor]
      return numbers[name][start : start + len(index)]
    return layout.read(numbers, block, factor)

  def one(block: str, factor: str) -> Health:
    largest, more, inverse = (read(numbers, block, factor) for numbers in (of_factors, added, of_inverses))
    return Health(largest, more, (largest + more) * inverse)

  report: dict[str, dict[str, Health]] = {}
  for block, factor in layout.places:
    report.setdefault(block, {})[factor] = one(block, factor)
  return report


def _largest(stack: Stack, x: Float[Array, '*m r n']) -> Float[Array, '*m']:
  """Returns the largest eigenvalue of every matrix of a stack, at the matrix's place."""
  x = accurate(x)
  if x.ndim == 4 and stack.row_sharded:  # every owner has some rows of each matrix
    product = lambda v: jnp.moveaxis(jnp.einsum('osrn,sn->osr', x, v), 0, 1).reshape(len(v), -1)[:, : stack.n]  # noqa: E731
    return jnp.broadcast_to(_power(product, (stack.slots, stack.n), x.dtype), (stack.owners, stack.slots))
  return _power(lambda v: jnp.einsum('...rn,...n->...r', x, v), (*x.shape[:-2], stack.n), x.dtype)


def _power(product: Callable, shape: tuple[int, ...], dtype: Any) -> Float[Array, '*m']:
  start = jnp.broadcast_to(jnp.cos(jnp.arange(shape[-1], dtype=dtype)), shape)
  norm = lambda v: jnp.sqrt((v * v).sum(-1, keepdims=True))  # noqa: E731
  unit = lambda v: v / jnp.maximum(norm(v), jnp.finfo(dtype).tiny)  # noqa: E731
  v = jax.lax.fori_loop(0, _ITERATIONS, lambda _, v: unit(product(v)), unit(start))
  return norm(product(v))[..., 0]
