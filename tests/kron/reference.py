"""Curvature the slow way: jacobians and one gradient per example, with none of the code under test."""

import jax
import jax.numpy as jnp
import numpy as np

from kronmesh import kron


def close(a, b, tolerance):
  """Norm-relative error below the tolerance."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
  assert a.shape == b.shape and error < tolerance, (a.shape, b.shape, error)


def in_shards(count):
  """A placement on one device that divides every batch into so many shards; None for one."""
  kind = type('InShards', (kron.Local,), {'shards': lambda self, examples: count})
  return kind() if count != 1 else None


def gram(rows):
  rows = np.asarray(rows, np.float64)
  return rows.T @ rows


def input_rows(linear, x, kernel, out_axes):
  """Rows a with y[r, o] = a[r] . W[:, o], from the jacobian of a map that is linear in its kernel.

  out_axes: the axes of y that run along the kernel's output features.
  """
  jacobian = jax.jit(jax.jacobian(lambda w: linear(x, w)))(kernel)
  y_ndim = jacobian.ndim - kernel.ndim
  out_axes = [a % y_ndim for a in out_axes]
  rows = [a for a in range(y_ndim) if a not in out_axes]
  jacobian = jacobian.transpose((*rows, *out_axes, *range(y_ndim, jacobian.ndim)))
  n_rows = int(np.prod([jacobian.shape[i] for i in range(len(rows))]))
  n_out = int(np.prod([jacobian.shape[len(rows) + i] for i in range(len(out_axes))]))
  # Only the entries of W that lead to output 0 matter; they hold the row, in the kernel's own order.
  first = np.asarray(jacobian.reshape(n_rows, n_out, -1))[:, 0]
  probe = np.abs(np.asarray(jax.jit(jax.jacobian(lambda w: linear(jnp.ones_like(x), w)))(kernel)))
  probe = probe.transpose((*rows, *out_axes, *range(y_ndim, y_ndim + kernel.ndim))).reshape(n_rows, n_out, -1)
  columns = np.flatnonzero(probe[:, 0].max(0))
  return first[:, columns]


def exact_fisher(network, params, x, root):
  """(1/N) sum_i J_iT root_i root_iT J_i over raveled parameters; root(z) is (columns, *z.shape) for one example."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)

  def one(xi):
    z, pull = jax.vjp(lambda p: network(unravel(p), xi[None])[0], flat)
    return jax.vmap(lambda c: pull(c)[0])(root(z))

  rows = jax.jit(lambda x: jax.lax.map(one, x))(x).reshape(-1, flat.size)
  return np.asarray(rows.T @ rows / x.shape[0])
