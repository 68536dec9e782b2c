"""Implements all-reduces of published record-setting runs as exchanges between neighbours inside of `jax.shard_map`.

Each equals `jax.lax.psum` up to rounding. `ring` is bandwidth-optimal (Patarasu and Yuan 2009). `hierarchical` reduces
within the inner axes first, so that only one share crosses the outer ones (Jia et al. 2018, arXiv:1807.11205, section
3.2). `torus` reduces along rows, then columns (Mikami et al. 2018, arXiv:1811.05233, figure 2); its sizes are those of
the mesh axes. Half precision halves the bytes; as in those runs, sums are made in float32 and rounded once a hop.
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
  """Returns the sum of x over mesh axes, on every device; call it inside of shard_map.

  Args:
    axes: the mesh axes, outermost first.
    method: one of `METHODS`. 'hierarchical' takes the last axis as the inner one; 'torus' needs two or more axes.
    half: a half-precision type for the transfer, or None for the type of x.

  Raises:
    ValueError: the method is unknown, or a torus has one axis.
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
  """Returns this device's share, along the leading axis, of the sum of x over mesh axes.

  Call it inside of shard_map. With `half`, devices send the terms in that type and add them up in the type of x. That
  sends as many bytes as a reduce-scatter in half precision, and rounds no sums.
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
  """Sums a tree of arrays with one `all_reduce` for each bucket of about `bucket_bytes` bytes.

  Arrays keep their order, so that the gradients of the last layers, which are ready first, share a bucket.
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
  """Groups the indices of arrays that travel together: arrays of one type, in order, until a group reaches the size."""
  by_dtype: dict[Any, list[list[int]]] = {}
  filled: dict[Any, int] = {}
  for i, leaf in enumerate(leaves):
    groups = by_dtype.setdefault(leaf.dtype, [])
    if not groups or filled[leaf.dtype] >= bucket_bytes:
      groups.append([])
      filled[leaf.dtype] = 0
    groups[-1].append(i)
    filled[leaf.dtype] += leaf.size * leaf.dtype.itemsize
  return [group for groups in by_dtype.values() for group in groups]


# --- for flat vectors whose length is a multiple of the number of devices


def _scatter_gather(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Sums by a reduce-scatter and an all-gather, both in half precision."""
  return jax.lax.all_gather(reduce_scatter(x, axes, half).astype(half), axes, tiled=True)


def _ring(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  share = _ring_scatter(x, axes, half)
  return _ring_gather(share.astype(half), axes)


def _ring_scatter(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Returns share k of the sum on device k; each share goes once round the ring and collects every device's part."""
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

  zeros = jnp.zeros((n, *share.shape), share.dtype) + jnp.zeros_like(share)  # varies over the mesh as the share does
  whole, _ = jax.lax.fori_loop(0, n - 1, hop, (place(zeros, me, share), share))
  return whole.reshape(-1)


def _to_next(x: Array, axes: tuple[str, ...]) -> Array:
  n = jax.lax.axis_size(axes)
  return jax.lax.ppermute(x, axes, [(k, (k + 1) % n) for k in range(n)])


def _hierarchical(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Reduces to shares along the inner axis, sums those over the outer axes, and gathers along the inner axis."""
  outer, inner = axes[:-1], axes[-1:]
  share = _ring_scatter(x, inner, half)
  share = _scatter_gather(share, outer, half).astype(x.dtype)
  return _ring_gather(share.astype(half), inner)


def _torus(x: Array, axes: tuple[str, ...], half: Any) -> Array:
  """Reduces along one axis after another, each time the share left by the last; then gathers in reverse order."""
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
