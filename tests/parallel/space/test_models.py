"""Models in strips equal whole ones: losses, gradients, factors and parameters of five K-FAC steps, on meshes of all axes;
and no activation is gathered.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import models, parallel
from tests.draws import integers, normal
from tests.parallel.problems import Problem, apart, arguments, compiled, five_steps

long = pytest.mark.long


def problems(dtype):
  """Heights and widths that do not divide, and some of them by less than the strips of the last layers."""
  image = lambda *shape: normal(8, *shape, dtype=dtype)  # noqa: E731
  labels, d = integers(5, 8), {'dtype': dtype}
  video = models.VideoTransformer(5, (4, 4), layers=2, width=16, heads=4, causal=True, window=2, keep='blocks', **d)
  residual = {'classes': 5, 'width': 8, 'bottleneck': False, **d}
  return {
    'resnet': Problem(models.ResNet((1, 1), stem='imagenet', **residual), 'resnet', image(36, 8, 3), labels),
    'resnet of clips': Problem(models.ResNet((1, 1), stem='patches', **residual), 'resnet', image(4, 36, 8, 2), labels),
    'convnet': Problem(models.ConvNet((8, 16), 5, **d), 'convnet', image(19, 8, 2), labels),
    'r2plus1d': Problem(
      models.R2Plus1D((1, 1), 5, 6, stem='small', keep='blocks', **d), 'r2plus1d', image(4, 11, 6, 2), labels
    ),
    'vit': Problem(models.ViT(5, (4, 4), layers=1, width=16, heads=4, **d), 'vit', image(20, 8, 3), labels),
    'video_transformer': Problem(video, 'video_transformer', image(3, 20, 8, 2), labels),
  }


NAMES = ('resnet', 'resnet of clips', 'convnet', 'r2plus1d', 'vit', 'video_transformer')
BRIEF = ('convnet',)
MESHES = ('space=8', 'fsdp=2,model=2,space=2', 'space=2,columns=4')
TOKENS = ('vit', 'video_transformer')  # they lie over one axis alone
CASES = [(name, spec) for name in NAMES for spec in MESHES if not ('columns' in spec and name in TOKENS)]
IN_FLOAT32 = [pytest.param(name, marks=[] if name in BRIEF else [long]) for name in NAMES]


@functools.cache
def on_one_device(name, dtype):
  return five_steps(compiled(problems(dtype)[name], parallel.make_mesh('data=1', jax.devices()[:1]), dtype))


def of(name, spec, dtype):
  return compiled(problems(dtype)[name], parallel.make_mesh(spec), dtype)


@pytest.mark.long('convnet')
@pytest.mark.parametrize('name', IN_FLOAT32)
def test_strips_equal_the_whole(name):
  found = five_steps(of(name, 'data=2,space=4', jnp.float32))
  assert max(apart(found, on_one_device(name, jnp.float32)).values()) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize('name, spec', CASES)
def test_strips_equal_the_whole_in_f64(x64, name, spec):
  assert max(apart(five_steps(of(name, spec, jnp.float64)), on_one_device(name, jnp.float64)).values()) <= 1e-10


@pytest.mark.long('convnet')
@pytest.mark.parametrize('name', IN_FLOAT32)
def test_no_activation_is_gathered(name):
  """Along the strips nothing is gathered but factors and their inverses, when they are renewed."""
  spec = 'space=4' if name in TOKENS else 'space=4,columns=2'
  c = of(name, f'data=2,{spec}' if name in TOKENS else spec, jnp.float32)
  found = parallel.audit(c.plain, *arguments(c), mesh=c.mesh)
  for axis in ('space', 'columns'):
    assert not found.select('all-gather', axis) and not found.select('all-to-all', axis), str(found)
    assert axis not in spec or found.select('collective-permute', axis)


def test_what_cannot_be_split_is_refused_by_name():
  mesh = parallel.make_mesh('data=2,space=4')
  x = normal(2, 16, 6, 4)
  own = {1: parallel.strip(mesh, 'space', 16)}
  refused = {
    'sort .*acts along axis 1': lambda x: jnp.sort(x, axis=1),
    'cumsum .*acts along axis 1': lambda x: jnp.cumsum(x, axis=1),
    'dot_general .*each device needs all rows': lambda x: jnp.einsum('bhwc,bkwc->bhk', x, x),
    'gather .*not known before': lambda x: x[:, x.mean((1, 2, 3)).astype(int)],
    'reshape .*joined with an axis before it': lambda x: x.reshape(-1, 6, 4),
    'custom_vjp_call .*custom_jvp': lambda x: own_backward(x),
    'reduce_prod .*no all-reduce': lambda x: x.prod(1),
  }
  for words, fn in refused.items():
    with pytest.raises(parallel.PartitionError, match=words) as error:
      parallel.partition(fn, mesh, (own,))(x)
    assert 'test_models.py:' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.long
def test_functions_that_close_over_values_of_others():
  mesh = parallel.make_mesh('data=2,space=4')
  x, w = normal(2, 8, 3), normal(3, 3)
  own = {1: parallel.strip(mesh, 'space', 8)}
  loss = lambda w, x: jnp.tanh(x @ w).mean()  # noqa: E731
  closed = lambda w: parallel.partition(lambda x: loss(w, x), mesh, (own,))(x)  # noqa: E731
  for run in (lambda f: f, jax.jit):
    np.testing.assert_allclose(run(jax.grad(closed))(w), jax.grad(loss)(w, x), rtol=1e-5)
  several = jax.vmap(lambda w: parallel.partition(loss, mesh, (None, own))(w, x))(jnp.stack([w, 2 * w]))
  np.testing.assert_allclose(several, [loss(w, x), loss(2 * w, x)], rtol=1e-5)


@jax.custom_vjp
def own_backward(x):
  return jnp.sin(x)


own_backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, d: (d,))


@pytest.mark.long
def test_a_refusal_names_the_layer():
  mesh = parallel.make_mesh('space=4,columns=2')
  problem = problems(jnp.float32)['vit']
  with pytest.raises(
    parallel.PartitionError,
    match=r"layer 'ViT', reshape at .*vit.py:\d+ cannot run in strips: axis 1 lies over 'space'",
  ):
    compiled(problem, mesh)


def test_meshes_that_do_not_fit_images():
  mesh = parallel.make_mesh('space=8')
  with pytest.raises(parallel.MeshError, match=r'space=8: images of \(4, 6\) have fewer rows'):
    parallel.image_strips(mesh, (2, 4, 6, 3))
  with pytest.raises(parallel.MeshError, match=r"axis 'space' divides images; examples of shape \(10,\)"):
    parallel.image_strips(mesh, (2, 10))
  with pytest.raises(parallel.MeshError, match=r'must have 8 strips of 2 rows, 9 of them no padding'):
    parallel.partition(jnp.sin, mesh, ({1: parallel.strip(mesh, 'space', 9)},))(normal(2, 9))
