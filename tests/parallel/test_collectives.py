"""Every all-reduce equals psum; bucketed, in half precision, on any mesh; the bytes are those of the method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kronmesh.parallel import audit, make_mesh, written
from kronmesh.parallel.collectives import METHODS, all_reduce, all_reduce_tree, buckets, reduce_scatter
from tests.draws import normal

P = PartitionSpec
MESHES = ('data=8', 'data=4,model=2', 'data=2,fsdp=2,model=2', 'data=2,model=4')


def summed(spec, x, fn):
  """`fn` on each device's own row of x, all of them the same afterwards."""
  mesh = make_mesh(spec)
  axes = mesh.axis_names
  mapped = jax.shard_map(
    lambda x: fn(x[0], axes)[None], mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False
  )
  return np.asarray(jax.jit(mapped)(x))


def fits(method, spec):
  return method in ('psum', 'ring') or ',' in spec


@pytest.mark.brief(
  'hierarchical-data=8-shape0',
  'torus-data=8-shape1',
  'psum-data=4,model=2-shape2',
  'ring-data=2,fsdp=2,model=2-shape0',
  'psum-data=2,model=4-shape0',
)
@pytest.mark.parametrize('shape', [(5, 7), (64,), (3,)])
@pytest.mark.parametrize('spec', MESHES)
@pytest.mark.parametrize('method', METHODS)
def test_equals_psum(method, spec, shape):
  if not fits(method, spec):
    with pytest.raises(ValueError, match='two or more mesh axes; got data'):
      summed(spec, normal(8, *shape), functools.partial(all_reduce, method=method))
    return
  x = normal(8, *shape)
  found = summed(spec, x, functools.partial(all_reduce, method=method))
  expected = summed(spec, x, jax.lax.psum)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert all((row == found[0]).all() for row in found), 'devices differ'


@pytest.mark.parametrize('method', METHODS)
def test_half_precision(method):
  """Terms are rounded on their way, at each hop of a ring; all devices have the same in the end, in the type they gave."""
  spec = 'data=4,model=2'
  x = normal(8, 40)
  found = summed(spec, x, functools.partial(all_reduce, method=method, half=jnp.bfloat16))
  exact = np.asarray(x).sum(0)
  assert np.abs(found - exact).max() < 8 * 2**-8 * np.abs(np.asarray(x)).sum(0).max() / 4
  assert found.dtype == np.float32 and all((row == found[0]).all() for row in found)


@pytest.mark.parametrize('half', [None, jnp.bfloat16])
def test_reduce_scatter(half):
  x = normal(8, 16, 3)
  mesh = make_mesh('data=4,model=2')
  fn = lambda x: reduce_scatter(x[0], ('data', 'model'), half)  # noqa: E731
  mapped = jax.shard_map(fn, mesh=mesh, in_specs=P(('data', 'model')), out_specs=P(('data', 'model')), check_vma=False)
  np.testing.assert_allclose(jax.jit(mapped)(x), np.asarray(x).sum(0), atol=1e-5 if half is None else 0.1)


def test_half_precision_sums_in_full():
  """Terms that bfloat16 can hold, whose sum it cannot: seven ones and 1 + 2^-7."""
  mesh = make_mesh('data=8')
  terms = jnp.where(jnp.arange(8)[:, None] == 7, 1 + 2**-7, 1.0) * jnp.ones((8, 16))
  fn = lambda x: reduce_scatter(x[0], 'data', jnp.bfloat16)  # noqa: E731
  mapped = jax.shard_map(fn, mesh=mesh, in_specs=P('data'), out_specs=P('data'), check_vma=False)
  assert float(jnp.asarray(8 + 2**-7, jnp.bfloat16)) == 8
  np.testing.assert_array_equal(jax.jit(mapped)(terms), 8 + 2**-7)


@pytest.mark.brief('psum-100', 'torus-1000000')
@pytest.mark.parametrize('bucket_bytes', [1, 100, 10**6])
@pytest.mark.parametrize('method', ['psum', 'torus'])
def test_a_tree_in_buckets(method, bucket_bytes):
  tree = {'a': normal(8, 5, 3), 'b': normal(8, 20, seed=2), 'c': normal(8, 2, 2, seed=3), 'd': normal(8, seed=4)}
  mesh = make_mesh('data=4,model=2')
  axes = ('data', 'model')
  each = lambda fn: jax.shard_map(  # noqa: E731
    lambda t: fn(jax.tree.map(lambda x: x[0], t), axes), mesh=mesh, in_specs=P(axes), out_specs=P(), check_vma=False
  )
  found = jax.jit(each(functools.partial(all_reduce_tree, method=method, bucket_bytes=bucket_bytes)))
  expected = jax.jit(each(jax.lax.psum))(tree)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found(tree), expected)
  reduces = written(each(functools.partial(all_reduce_tree, bucket_bytes=bucket_bytes)), tree, mesh=mesh)
  assert len(reduces) == {1: 4, 100: 2, 10**6: 1}[bucket_bytes]


def test_buckets_keep_types_apart_and_order():
  leaves = [jnp.ones(10), jnp.ones(10, jnp.bfloat16), jnp.ones(5), jnp.ones(100)]
  assert buckets(leaves, 50) == [[0, 2], [3], [1]]


@pytest.mark.parametrize('method, hops', [('ring', {'data': 14}), ('torus', {'data': 6, 'model': 2})])
def test_the_bytes_of_rings(method, hops):
  """2 (n - 1) hops of an n-th of the vector along each axis; a torus' second axis has the first one's share."""
  spec = 'data=8' if method == 'ring' else 'data=4,model=2'
  mesh = make_mesh(spec)
  fn = jax.shard_map(
    lambda x: all_reduce(x[0], mesh.axis_names, method),
    mesh=mesh,
    in_specs=P(mesh.axis_names),
    out_specs=P(),
    check_vma=False,
  )
  found = audit(jax.jit(fn), jnp.ones((8, 64)), mesh=mesh).select('collective-permute')
  assert {a: sum(c.count for c in found.select(axis=a)) for a in hops} == hops
  sizes = {'data': 64 * 4 // 8, 'model': 64 * 4 // 2}
  assert all(c.bytes == sizes[c.axes] for c in found)


def test_an_unknown_method_is_one_line():
  with pytest.raises(ValueError, match="method 'tree' is unknown; choose from psum, ring, hierarchical, torus"):
    all_reduce(jnp.ones(3), 'data', 'tree')
