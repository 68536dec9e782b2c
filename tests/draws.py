"""Random numbers for tests, by numpy: `jax.random` compiles a program for every new shape."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=1, scale=1.0, dtype=None):
  return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype or jnp.float32)


def integers(high, *shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def normals(shapes, seed=0, dtype=None):
  """Normal parameters of these shapes, of the size that keeps activations near one."""
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
  scales = [max(1, int(np.prod(s[:-1]))) ** -0.5 for s in leaves]
  draws = [
    normal(*s, seed=(seed, k), scale=c, dtype=dtype) for k, (s, c) in enumerate(zip(leaves, scales, strict=True))
  ]
  return treedef.unflatten(draws)
