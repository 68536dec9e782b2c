"""Initialisers and activations with named logical axes, which `parallel.RULES` maps to a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float


def named(init: Callable, *axes: str | None) -> Callable:
  return nn.with_logical_partitioning(init, axes)


def dense(features: int, names: tuple[str | None, str | None], init: Callable, **kwargs) -> nn.Dense:
  """Makes a Dense layer whose kernel has these logical axes and whose bias has the last."""
  return nn.Dense(
    features, kernel_init=named(init, *names), bias_init=named(nn.initializers.zeros_init(), names[-1]), **kwargs
  )


def accurate(x: Float[Array, '...']) -> Float[Array, '...']:
  """Casts to at least float32, the precision that losses need."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


REMAT = {
  'blocks': None,
  'products': jax.checkpoint_policies.dots_saveable,
  'weights': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(block: type[nn.Module], keep: str) -> type[nn.Module]:
  """Makes the backward pass compute a block's activations again, except those that are kept.

  Args:
    block: the class of the block.
    keep: 'all' (nothing is computed again), 'blocks' (the inputs of blocks are kept), 'products' (results of matrix
      products are kept too) or 'weights' (as 'products', but only for products with weights, not attention's).

  Raises:
    ValueError: `keep` is none of these.
  """
  if keep == 'all':
    return block
  if keep not in REMAT:
    raise ValueError(f'keep={keep!r} is unknown; choose from all, {", ".join(REMAT)}')
  return nn.remat(block, policy=REMAT[keep])


def blocks(
  make: Callable[..., nn.Module], x: Float[Array, 'b ...'], layers: int, stacked: bool
) -> Float[Array, 'b ...']:
  """Applies `layers` blocks one after another, named `block_0` and so on, or one named `blocks` in a loop.

  Args:
    make: (name=) -> a block.
    stacked: whether to use a loop; parameters then lead with the logical axis 'layers'.
  """
  if not stacked:
    for i in range(layers):
      x = make(name=f'block_{i}')(x)
    return x
  run = nn.scan(
    lambda block, x, _: (block(x), None),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=layers,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  return run(make(name='blocks'), x, None)[0]


def constrain(x: Float[Array, '...'], *names: str | None) -> Float[Array, '...']:
  """Shards an activation with these logical axes by the rules in force (`parallel.logical_axes`), if there are any.

  An axis whose size does not divide stays whole, as a parameter's does.
  """
  rules = dict(nn.get_logical_axis_rules())
  mesh = jax.sharding.get_abstract_mesh()
  if not rules or mesh.empty:
    return x
  spec: list = []
  for size, name in zip(x.shape, names, strict=True):
    axes = rules.get(name) or ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    fits = axes and size % math.prod(mesh.shape[a] for a in axes) == 0
    spec.append(axes if fits else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
