"""Random programs as data-parallel steps: the examples divided over emulated devices by `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kronmesh import kron
from tests.kron.random_check import Wrong, block_error, check, near, outcome
from tests.kron.random_programs import generate
from tests.kron.random_reference import Coupled, Measured

EXAMPLES = 8
MESHES = {
  'one axis': ((8,), ('d',), ('d',)),
  'two axes': ((4, 2), ('d', 'e'), ('d', 'e')),
  'one of two axes': ((4, 2), ('d', 'e'), ('d',)),
}  # the mesh's shape, its axes, and those that the batch is divided over
MODES = (
  'loss of a shard_map',
  'step in a shard_map',
  'step in a shard_map, unchecked',
  'loss of a shard_map, unchecked',
)


def plan(seed):
  """The mesh, the mode and the kind of mean of a seed."""
  rng = np.random.default_rng((seed, 1))
  pick = lambda choices: choices[rng.integers(len(choices))]  # noqa: E731
  return pick(list(MESHES)), pick(MODES), pick(('pmean', 'psum'))


def check_sharded(seed):
  mesh, mode, mean = plan(seed)
  program = generate(seed, None, EXAMPLES, divisible=True)
  try:
    measured = Measured(program, program.fisher)
    for use in measured.uses:
      measured.outer(use)
  except Coupled:
    program = generate(seed, 'empirical', EXAMPLES, divisible=True)
    measured = Measured(program, 'empirical')
  mean = 'psum' if 'mask' in program.kinds else mean
  program.kinds[:0] = [f'shard_map: {mode}', mesh, mean]
  return outcome(program, lambda: compare_sharded(program, measured, mesh, mode, mean))


def compare_sharded(program, measured, mesh, mode, mean):
  shape, axes, batch = MESHES[mesh]
  mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:8])
  params, args = program.wrapped(), tuple(jnp.asarray(a) for a in program.args)
  specs = tuple(PartitionSpec(batch) if a.ndim else PartitionSpec() for a in args)
  whole = PartitionSpec()

  def average(total, count):
    if mean == 'pmean':
      return jax.lax.pmean(total / count, batch)
    return jax.lax.psum(total, batch) / jax.lax.psum(count, batch)

  def over(fn, checked, out):
    return jax.shard_map(fn, mesh=mesh, in_specs=(whole, *specs), out_specs=out, check_vma=checked)

  local, found, checked = program.loss(average=average), [], 'unchecked' not in mode
  if mode.startswith('loss'):
    found.append(kron.curvature(over(local, checked, whole), params, *args, fisher=program.fisher))
    run = found[0].value_and_grad
  else:

    def step(params, *args):
      found.append(kron.curvature(local, params, *args, fisher=program.fisher))
      value, grads, stats = found[-1].value_and_grad(params, *args)
      return value, grads, stats if checked else jax.lax.psum(stats, batch)

    run = over(step, checked, whole)
  value, grads, stats = jax.jit(run)(params, *args)
  unmarked = program.loss(marked=False, average=average)
  plainly = jax.value_and_grad(unmarked if mode.startswith('step') else over(unmarked, checked, whole))
  right = jax.jit(over(plainly, checked, whole) if mode.startswith('step') else plainly)(params, *args)
  for name, a, b in zip(
    ['value', *kron.param_names(params)], [value, *jax.tree.leaves(grads)], jax.tree.leaves(right), strict=True
  ):
    near(f'value or gradient of {name}', a, b, 1e-11)
  if not found[-1].blocks:
    raise Wrong('there are no blocks')
  return max(block_error(block, stats, measured, params) for block in found[-1].blocks)


def sweep(seeds):
  """The outcomes of these programs; every eighth is a data-parallel step instead."""
  return [check_sharded(seed) if seed % 8 == 7 else check(seed) for seed in seeds]
