"""Sharded equals unsharded: losses, gradients, factors and parameters of five K-FAC steps, for all families and axes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kronmesh import parallel
from tests.parallel.problems import apart, compiled, five_steps, problems

MODELS = ('mlp', 'resnet', 'convnet', 'transformer')
AXES = ('data=8', 'fsdp=8', 'model=8')
PAIRS = ('data=4,fsdp=2', 'data=4,model=2', 'fsdp=4,model=2')
ALL = 'data=2,fsdp=2,model=2'
PLACEMENTS = {
  'MEM-OPT': ('data=4,model=2', {'inverses': 'owners'}),
  'nothing split': ('fsdp=4,model=2', {'row_sharded': False}),
  'MEM-OPT, nothing split': ('data=8', {'inverses': 'owners', 'row_sharded': False}),
  'model first': ('model=2,data=4', {'inverses': 'owners'}),
}
long = pytest.mark.long


@functools.cache
def on_one_device(model, dtype):
  return five_steps(compiled(problems(dtype)[model], parallel.make_mesh('data=1', jax.devices()[:1]), dtype))


def errors(model, spec, dtype, **settings):
  mesh = parallel.make_mesh(spec)
  c = compiled(problems(dtype)[model], mesh, dtype, parallel.Placement(mesh, **settings))
  return apart(five_steps(c), on_one_device(model, dtype))


CASES = [(m, s) for s in (*AXES, *PAIRS) for m in MODELS]
CASES += [(m, ALL) for m in ('transformer', 'r2plus1d', 'video_transformer')]


@pytest.mark.long
@pytest.mark.parametrize('model, spec', CASES)
def test_eight_devices_equal_one(model, spec):
  assert max(errors(model, spec, jnp.float32).values()) <= 1e-5


@pytest.mark.brief('mlp-data=8')
@pytest.mark.parametrize('model, spec', CASES)
def test_eight_devices_equal_one_in_f64(x64, model, spec):
  assert max(errors(model, spec, jnp.float64).values()) <= 1e-10


FOR_ALL = ('MEM-OPT', 'nothing split')
PLACED = [(m, p) for p in PLACEMENTS for m in MODELS if p in FOR_ALL or m in ('transformer', 'mlp')]


@pytest.mark.long
@pytest.mark.parametrize('model, placement', PLACED)
def test_placement_never_changes_a_result(model, placement):
  spec, settings = PLACEMENTS[placement]
  assert max(errors(model, spec, jnp.float32, **settings).values()) <= 1e-5


@pytest.mark.long
def test_statistics_in_half_precision_are_near():
  """Each term is rounded once, the sums are not: 2^-9 of a factor at most."""
  found = errors('transformer', 'data=4,model=2', jnp.float32, statistics='bfloat16')
  assert 1e-5 < found['factors'] < 2**-9 and found['gradients'] < 1e-5


@pytest.mark.long
@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('inverses', ['everywhere', 'owners'])
def test_blocks_along_the_shards_equal_the_same_blocks_on_one_device(model, inverses):
  mesh = parallel.make_mesh('data=2,model=4')
  problem = problems(jnp.float32)[model]
  blocks = parallel.shard_blocks(compiled(problem, mesh).shardings[0])
  sides = {side for parts in blocks.values() for side in parts}
  assert blocks and sides == {'A', 'G'}
  placement = parallel.Placement(mesh, inverses)
  found = compiled(problem, mesh, placement=placement, blocks=blocks)
  assert '4 blocks of' in str(found.curvature)
  one = parallel.make_mesh('data=1', jax.devices()[:1])
  assert max(apart(five_steps(found), five_steps(compiled(problem, one, blocks=blocks))).values()) <= 1e-5
