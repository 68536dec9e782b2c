"""All-reduces of the record runs, written out by neighbours; to be called inside of `jax.shard_map`.

Each equals `jax.lax.psum` but for rounding. `ring` is bandwidth-optimal (Patarasu and Yuan 2009); `hierarchical` reduces
within the inner axes first, so that only one share crosses the outer ones (Jia et al. 2018, arXiv:1807.11205, section 3.2);
`torus` reduces along rows, then columns (Mikami et al. 2018, arXiv:1811.05233, figure 2; their sizes are the mesh axes').
Half precision halves the bytes; sums are made in float32 and rounded once for each hop, as in those runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

METHODS = ('psum', 'ring', 'hierarchical', 'torus')


def all_reduce(
  x: Float[Array, '...'], axes: str | Sequence[str], method: str = 'psum', half: Any = None
) -> Float[Array, '...']:
  """The sum of x over mesh axes, on every device; inside of shard_map.

  Args:
    axes: outermost first.
    method: one of `METHODS`. 'hierarchical' takes the last axis for the inner one, 'torus' needs two or more.
    half: a half-precision type to travel in, or None for x's own.

  Raises:
    ValueError: an unknown method, or a torus of one axis.
  """
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  if method not in METHODS:
    raise ValueError(f'all-reduce method {method!r} is unknown; choose from {", ".join(METHODS)}')
  if method in ('hierarchical', 'torus') and len(axes) < 2:
    raise ValueError(f'{method!r} runs along two or more mesh axes; got {", ".join(axes)}')
  if not axes:
    return x
  if method == 'psum' and half is None:
    return jax.lax.psum(x, axes)
  flat = x.reshape(-1)
  n = math.prod(jax.lax.axis_size(a) for a in axes)
  padded = jnp.pad(flat, (0, -flat.size % n))
  result = _REDUCE[method](padded, axes, half or x.dtype)
  return result[: flat.size].reshape(x.shape).astype(x.dtype)


def reduce_scatter(x: Float[Array, 'n ...'], axes: str | Sequence[str], half: Any = None) -> Float[Array, 'm ...']:
  """This device's share, by the leading axis, of the sum of x over mesh axes; inside of shard_map.

  In half precision the terms travel and are added up in x's own type: the same bytes, and no rounding of sums.
  """
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  if half is None:
    return jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)
  n = jax.lax.axis_size(axes)
  terms = x.astype(half).reshape(n, -1, *x.shape[1:])
  return jax.lax.all_to_all(terms, axes, 0, 0, tiled=True).astype(x.dtype).sum(0)


def all_reduce_tree(
  tree: Any, axes: str | Sequence[str], method: str = 'psum', half: Any = None, bucket_bytes: int = 2**25
) -> Any:
  """`all_reduce` of a tree of arrays, put together to buckets of about so many bytes: one collective each.

  Arrays keep their order, so that the last layers' gradients, which are there first, share a bucket.
  """
  leaves, treedef = jax.tree.flatten(tree)
  result: list[Any] = [None] * len(leaves)
  for bucket in buckets(leaves, bucket_bytes):
    joined = jnp.concatenate([leaves[i].reshape(-1) for i in bucket])
    joined = all_reduce(joined, axes, method, half)
    ends = np.cumsum([leaves[i].size for i in bucket])
    for i, part in zip(bucket, jnp.split(joined, ends[:-1]), strict=True):
      result[i] = part.reshape(leaves[i].shape)
  return jax.tree.unflatten(treedef, result)


def buckets(leaves: Sequence[Any], bucket_bytes: int) -> list[list[int]]:
  """Numbers of arrays that travel together: of one type, in order, full once they reach the size."""
  found: dict[Any, list[list[int]]] = {}
  filled: dict[Any, int] = {}
  for i, leaf in enumerate(leaves):
    own = found.setdefault(leaf.dtype, [])
    if not own or filled[leaf.dtype] >= bucket_bytes:
      own.append([])
      filled[leaf.dtype] = 0
    own[-1].append(i)
    filled[leaf.dtype] += leaf.size * leaf.dtype.itemsize
  return [bucket for own in found.values() for bucket in own]


# --- flat vectors whose length the devices divide


def _scatter_gather(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """A reduce-scatter and an all-gather, in half precision."""
  return jax.lax.all_gather(reduce_scatter(x, axes, half).astype(half), axes, tiled=True)


def _ring(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  share = _ring_scatter(x, axes, half)
  return _ring_gather(share.astype(half), axes)


def _ring_scatter(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Share number k of the sum, on device k: each share goes once round the ring and takes every device's part up."""
  n, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  parts = x.reshape(n, -1)
  part = lambda k: jax.lax.dynamic_index_in_dim(parts, k % n, keepdims=False)  # noqa: E731

  def hop(i, sums):
    arrived = _to_next(sums.astype(half), axes).astype(x.dtype)
    return arrived + part(me - 2 - i)

  return jax.lax.fori_loop(0, n - 1, hop, part(me - 1))


def _ring_gather(share: Array, axes: tuple[str, ...]) -> Array:
  n, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  place = lambda whole, k, s: jax.lax.dynamic_update_index_in_dim(whole, s, k % n, 0)  # noqa: E731

  def hop(i, carry):
    whole, passing = carry
    passing = _to_next(passing, axes)
    return place(whole, me - 1 - i, passing), passing

  zeros = jnp.zeros((n, *share.shape), share.dtype) + jnp.zeros_like(share)  # varies as the share does
  whole, _ = jax.lax.fori_loop(0, n - 1, hop, (place(zeros, me, share), share))
  return whole.reshape(-1)


def _to_next(x: Array, axes: tuple[str, ...]) -> Array:
  n = jax.lax.axis_size(axes)
  return jax.lax.ppermute(x, axes, [(k, (k + 1) % n) for k in range(n)])


def _hierarchical(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Within the inner axis down to shares, these over the outer axes, and back."""
  outer, inner = axes[:-1], axes[-1:]
  share = _ring_scatter(x, inner, half)
  share = _scatter_gather(share, outer, half).astype(x.dtype)
  return _ring_gather(share.astype(half), inner)


def _torus(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Rings along one axis after another, each with the share that the last has left; then back in reverse."""
  share = x
  for axis in reversed(axes):
    share = _ring_scatter(share, (axis,), half)
  whole = share.astype(half)
  for axis in axes:
    whole = _ring_gather(whole, (axis,))
  return whole


_REDUCE: dict[str, Callable] = {
  'psum': _scatter_gather,
  'ring': _ring,
  'hierarchical': _hierarchical,
  'torus': _torus,
}
