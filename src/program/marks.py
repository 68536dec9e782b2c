"""Marks, identities for JAX, that a program carries from the code that knows a fact to the code that reads it."""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float

# The observation mark is an identity on its first operand (the network's outputs) that survives jit, vmap, remat and
# grad. A mask (`masked`) and a weight (`weighted`) of the observations may follow, then other arrays the likelihood
# reads. Only a program under `curvature` ever looks at the mark.

observe_p = jex.Primitive('kron_observe')


@observe_p.def_impl
def _observe_impl(outputs, *more, **params):
  del more, params
  return outputs


@observe_p.def_abstract_eval
def _observe_abstract(outputs, *more, **params):
  del more, params
  return outputs


def _observe_jvp(primals, tangents, **params):
  return observe_p.bind(*primals, **params), tangents[0]


def _observe_batch(operands, dims, **params):
  # The batched axis becomes one more leading axis, for more observations. One number for all of them stays one number.
  size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)

  def moved(x, d):
    if d is not None:
      return jnp.moveaxis(x, d, 0)
    return x if x.ndim == 0 else jnp.broadcast_to(x, (size, *x.shape))

  first = operands[0] if dims[0] is not None else jnp.broadcast_to(operands[0], (size, *operands[0].shape))
  first_dim = dims[0] if dims[0] is not None else 0
  rest = [moved(x, d) for x, d in zip(operands[1:], dims[1:], strict=True)]
  return observe_p.bind(moved(first, first_dim), *rest, **params), 0


ad.primitive_jvps[observe_p] = _observe_jvp
batching.primitive_batchers[observe_p] = _observe_batch
mlir.register_lowering(observe_p, lambda ctx, outputs, *more, **params: [outputs])


# The mark of uses is an identity on the input of a linear operation. Its second operand says which of the operation's
# results are uses of the kernel.

used_p = jex.Primitive('kron_used')


@used_p.def_impl
def _used_impl(x, where):
  del where
  return x


@used_p.def_abstract_eval
def _used_abstract(x, where):
  del where
  return x


def _used_jvp(primals, tangents):
  return used_p.bind(*primals), tangents[0]


def _used_batch(operands, dims):
  x, where = operands
  size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
  x = jnp.broadcast_to(x, (size, *x.shape)) if dims[0] is None else jnp.moveaxis(x, dims[0], 0)
  where = where[None] if dims[1] is None else jnp.moveaxis(where, dims[1], 0)
  return used_p.bind(x, where), 0


ad.primitive_jvps[used_p] = _used_jvp
batching.primitive_batchers[used_p] = _used_batch
mlir.register_lowering(used_p, lambda ctx, x, where: [x])

# The mark of copies is an identity on parameters that lead with an axis of examples.

copies_p = jex.Primitive('kron_copies')
copies_p.def_impl(lambda x: x)
copies_p.def_abstract_eval(lambda x: x)
ad.deflinear2(copies_p, lambda ct, x: [ct])
batching.defvectorized(copies_p)
mlir.register_lowering(copies_p, lambda ctx, x: [x])


def used(x: Float[Array, '...'], where: Bool[Array, '...']) -> Float[Array, '...']:
  """Marks which results of a linear operation count; see `kron.used`."""
  return used_p.bind(x, where)


def copies(x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
  """Marks parameters that were repeated for every example; see `kron.copies`."""
  return copies_p.bind(x)
