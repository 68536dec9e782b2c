"""Exact attention over tokens in strips: keys and values go round the devices and the softmax is updated as they pass.

This is ring attention (Liu et al. 2023, arXiv:2310.01889) with the running maximum of Milakov and Gimelshein 2018. A
device never holds more keys than its share and those that pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ...program import Op, vary, varying
from .halo import Strip, own_part
from .values import Value, index, laid, on_device, refuse


def attend(op: Op, inputs: list[Any]) -> list[Value]:
  """Runs `models.attention.attend` on (*b, tokens, heads, d), with or without a mask (queries, keys)."""
  q, k, v, *mask = (on_device(x) for x in inputs)
  tokens = len(q.strips) - 3
  strip = q.strips[tokens] or k.strips[tokens]
  lying = [(d, s) for x in (q, k, v) for d, s in x.dims if d != tokens]
  for d, s in lying:
    if d > tokens:
      refuse(op, f'axis {d} of its operands, heads or features, lies over {s.axis!r}')
  others = tuple(next((x.strips[d] for x in (q, k, v) if x.strips[d] is not None), None) for d in range(tokens))
  strips = (*others, strip, None, None)
  if strip is not None and k.shape[tokens] != q.shape[tokens]:
    refuse(op, f'queries and keys are not the same tokens, and lie over {strip.axis!r}')
  q, k, v = (laid(x, strips) for x in (q, k, v))
  if mask and not mask[0].whole:
    refuse(op, 'its mask lies in strips')
  own_mask = mask[0].x if mask else None
  if strip is None:
    return [Value(plain(q, k, v, own_mask), strips)]
  return [Value(ring(q, k, v, own_mask, strip), strips)]


def plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  """Computes attention where no tokens lie in strips."""
  logits = _logits(q, k)
  logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
  return jnp.einsum('...hqk,...khd->...qhd', jax.nn.softmax(logits).astype(v.dtype), v)


def _logits(q: Float[Array, '*b q h d'], k: Float[Array, '*b k h d']) -> Float[Array, '*b h q k']:
  logits = jnp.einsum('...qhd,...khd->...hqk', q, k)
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / q.shape[-1] ** 0.5


def ring(
  q: Float[Array, '*b q h d'],
  k: Float[Array, '*b k h d'],
  v: Float[Array, '*b k h d'],
  mask: Bool[Array, 'queries keys'] | None,
  strip: Strip,
) -> Float[Array, '*b q h d']:
  """Attends to the keys that have arrived in each turn, and passes them on; the last turn passes nothing.

  The backward pass computes the weights of each turn again, so that a device keeps keys, not weights.
  """
  n = strip.shards
  if mask is not None:
    mask = jnp.pad(own_part(mask, 0, strip), ((0, 0), (0, strip.rows)))  # so that dynamic_slice shifts no slice
  firsts, counts = jnp.asarray(strip.firsts), jnp.asarray(strip.counts)

  @jax.checkpoint
  def turn(state, q, k, v, owner):
    best, total, weighted = state
    logits = _logits(q, k)
    sees = jnp.arange(strip.rows) < counts[owner]
    if mask is not None:
      sees &= lax.dynamic_slice_in_dim(mask, firsts[owner], strip.rows, 1)
    logits = logits if mask is None and strip.even else jnp.where(sees, logits, -jnp.inf)
    new = lax.stop_gradient(jnp.maximum(best, logits.max(-1)))
    safe = jnp.where(jnp.isfinite(new), new, 0)
    weights = jnp.exp(logits - safe[..., None])
    shrunk = jnp.exp(best - safe)
    total = total * shrunk + weights.sum(-1)
    added = jnp.einsum('...hqk,...khd->...qhd', weights.astype(v.dtype), v).astype(weighted.dtype)
    return new, total, weighted * _beside(shrunk) + added

  best = jnp.full(_logits(q, k[..., :1, :, :]).shape[:-1], -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
  state = (best, jnp.zeros_like(best), jnp.zeros(v.shape, best.dtype))
  state = tuple(vary(x, varying(q) | varying(k) | varying(v)) for x in state)
  here = index(strip)
  for i in range(n):
    state = turn(state, q, k, v, (here + i) % n)
    if i + 1 < n:
      k, v = (lax.ppermute(x, strip.axis, [((j + 1) % n, j) for j in range(n)]) for x in (k, v))
  _, total, weighted = state
  total = jnp.where(total > 0, total, 1)
  return (weighted / _beside(total)).astype(v.dtype)


def _beside(x: Float[Array, '*b h q']) -> Float[Array, '*b q h 1']:
  return jnp.swapaxes(x, -1, -2)[..., None]


RULES = {'attend': attend}
