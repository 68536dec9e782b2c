"""Functions with collectives on known lines, for the tests of the audit."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def whole(x, mesh):
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def gathered(x, mesh):
  return whole(jnp.sin(jnp.tanh(x)), mesh)  # planted


def gathered_in_a_loop(x, mesh):
  def body(carry, row):
    return carry + whole(jnp.sin(row * carry.sum()), mesh), None  # planted in a loop

  return jax.lax.scan(body, jnp.ones(x.shape[1:]), jnp.stack([x] * 5)[:, 0])[0]


def line_of(mark):
  with open(__file__) as file:
    return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f'# {mark}'))
