"""Runs a loop over layers as a pipeline, with the layers sharded over the devices of a mesh axis.

Each device has some of the layers, and microbatches go from one device to the next (GPipe, Huang et al. 2019,
arXiv:1811.06965).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...program import Op, vary, varying
from ..mesh import BATCH
from .halo import MICROBATCH, Strip
from .values import Value, index, refuse, summed

MOST = 4  # microbatches for each stage; with so many, a device is idle in at most one fifth of the ticks


def pipeline(
  op: Op, values: list[Value], n_consts: int, n_carry: int, stage: Callable[[list[Value]], list[Value]]
) -> list[Value]:
  """Runs the loop through all layers and returns its carried value on every device.

  In each tick a device runs its layers on what the previous device has passed on. In its first and last ticks a device
  may have no examples. What it computes then is discarded, and does not enter K-FAC's factors.

  Args:
    op: the loop over layers. It carries one value, whose first axis counts examples, and has no results for each layer.
    values: the constants, the carried value, and the layers, of which this device has its share.
    stage: runs this device's layers on the same kinds of values.
  """
  strip = next(v.strips[0] for v in values[n_consts + n_carry :] if v.strips[0] is not None)
  n = strip.shards
  layers = values[n_consts + n_carry :]
  if n_carry != 1 or len(op.outputs) != 1:
    refuse(op, f'its layers lie over {strip.axis!r}, and it carries more than one value or returns some of every layer')
  if not strip.even or any(v.strips[0] is None for v in layers):
    refuse(op, f'{strip.size} layers do not divide by {strip.axis}={n}')
  (carried,) = values[n_consts : n_consts + 1]
  if not carried.strips or carried.strips[0] is not None:
    refuse(op, 'what it carries has no first axis that counts examples')
  local_layers = [v._replace(strips=(None, *v.strips[1:])) for v in layers]
  count = microbatches(carried.x.shape[0], n)
  parts = divided(carried.x, count)
  examples = Strip(MICROBATCH, count, carried.x.shape[0], carried.x.shape[0] // count)
  strips = (examples, *carried.strips[1:])  # microbatches are strips of this axis, taken one at a time
  here = index(strip)
  axes = frozenset().union(*(varying(v.x) for v in values)) | {strip.axis}

  def tick(received: Array, t: Array) -> tuple[Array, Array]:
    first = lax.dynamic_index_in_dim(parts, jnp.minimum(t, count - 1), keepdims=False)
    x = jnp.where(here == 0, first, received)
    live = (t >= here) & (t < here + count)
    (out,) = stage([*values[:n_consts], Value(x, strips, live), *local_layers])
    if out.strips != strips:
      refuse(op, 'its layers change how what they carry lies over the devices')
    y = vary(out.x, axes)
    return lax.ppermute(y, strip.axis, [(i, i + 1) for i in range(n - 1)]), y

  nothing = vary(jnp.zeros_like(parts[0]), axes)
  _, passed = lax.scan(tick, nothing, jnp.arange(count + n - 1))
  done = jnp.where(here == n - 1, passed[n - 1 :], jnp.zeros((), passed.dtype))
  return [Value(joined(summed(done, (strip.axis,))), carried.strips)]


def microbatches(examples: int, stages: int) -> int:
  """Returns the number of microbatches: the most that divide every shard of the batch, up to `MOST` for each stage."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = math.prod(n for axis, n in mesh.shape.items() if axis in BATCH and axis not in mesh.manual_axes)
  each = examples // shards if examples % shards == 0 else examples
  return max(m for m in range(1, MOST * stages + 1) if each % m == 0)


def divided(x: Float[Array, 'b ...'], count: int) -> Float[Array, 'm k ...']:
  """Divides a batch into microbatches, each with the same number of examples of every shard."""
  return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def joined(parts: Float[Array, 'm k ...']) -> Float[Array, 'b ...']:
  """Joins microbatches to a batch; the inverse of `divided`."""
  return jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])
