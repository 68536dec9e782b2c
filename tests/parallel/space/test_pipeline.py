"""Pipelines equal one device, with K-FAC's factors, and with every other axis."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron, models, parallel
from tests.draws import integers, normal
from tests.parallel.problems import Problem, apart, compiled, five_steps

long = pytest.mark.long
ROOT = Path(__file__).parents[3]


def problem(dtype=jnp.float32, name='video_transformer'):
  settings = {'layers': 4, 'width': 16, 'heads': 4, 'stacked': True, 'keep': 'blocks', 'dtype': dtype}
  labels = integers(5, 16)
  if name == 'vit':
    return Problem(models.ViT(5, (4, 4), **settings), 'vit', normal(16, 8, 8, 3, dtype=dtype), labels)
  if name == 'transformer':
    tokens = integers(12, 16, 6)
    return Problem(models.Transformer(12, 6, **settings), 'transformer', tokens, integers(12, 16, 6, seed=2))
  model = models.VideoTransformer(5, (4, 4), causal=True, window=2, **settings)
  return Problem(model, 'video_transformer', normal(16, 3, 20, 8, 2, dtype=dtype), labels)


@functools.cache
def on_one_device(name, dtype):
  return five_steps(compiled(problem(dtype, name), parallel.make_mesh('data=1', jax.devices()[:1]), dtype))


def errors(name, spec, dtype, **settings):
  mesh = parallel.make_mesh(spec)
  c = compiled(problem(dtype, name), mesh, dtype, parallel.Placement(mesh, **settings))
  return apart(five_steps(c), on_one_device(name, dtype))


CASES = [
  ('vit', 'data=2,pipe=4'),
  ('transformer', 'data=4,pipe=2'),
  ('video_transformer', 'data=2,pipe=4'),
  ('video_transformer', 'data=2,pipe=2,space=2'),
  ('video_transformer', 'fsdp=2,pipe=2,space=2'),
  ('video_transformer', 'pipe=2,model=2,space=2'),
]


@pytest.mark.long
@pytest.mark.parametrize('name, spec', CASES)
def test_a_pipeline_equals_one_device(name, spec):
  assert max(errors(name, spec, jnp.float32).values()) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize('name, spec', CASES)
def test_a_pipeline_equals_one_device_in_f64(x64, name, spec):
  assert max(errors(name, spec, jnp.float64).values()) <= 1e-10


@pytest.mark.long
def test_mem_opt():
  assert max(errors('vit', 'data=2,pipe=4', jnp.float32, inverses='owners').values()) <= 1e-5


@pytest.mark.long
def test_all_axes_together():
  """data x fsdp x model x space x pipe: 32 devices, in a process of their own."""
  done = subprocess.run(
    [sys.executable, '-m', 'tests.parallel.space.all_axes'], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert max(json.loads(done.stdout.splitlines()[-1]).values()) <= 1e-10


def test_what_no_pipeline_can_run_is_refused():
  mesh = parallel.make_mesh('data=2,pipe=4')
  x, w = normal(8, 6), normal(4, 6, 6)
  layers = {0: parallel.Strip('pipe', 4, 4)}

  def over(step):
    return parallel.partition(lambda w, x: jax.lax.scan(step, x, w)[0], mesh, (layers, None))(w, x)

  def reads_all(x, w):
    return jnp.tanh(x @ w) - x.mean(0), None

  def returns(x, w):
    return jnp.tanh(x @ w), x.sum()

  with pytest.raises(
    parallel.PartitionError, match='puts examples together, and a pipeline has some of them at a time'
  ):
    over(reads_all)
  with pytest.raises(parallel.PartitionError, match='carries more than one value or returns some of every layer'):
    parallel.partition(lambda w, x: jax.lax.scan(returns, x, w), mesh, (layers, None))(w, x)
  with pytest.raises(parallel.MeshError, match=r'set model.stacked=True'):
    compiled(Problem(models.MLP((8,), 5), 'mlp', normal(16, 10), integers(5, 16)), mesh)


def test_layers_that_are_used_outside_of_their_loop_are_refused():
  mesh = parallel.make_mesh('data=2,pipe=4')
  x, params = normal(8, 6), {'w': normal(4, 6, 6)}

  def loss(params, x):
    y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params['w'])[0]
    y = kron.observe.gaussian(y)
    return (y**2).mean()

  spread = parallel.partition(loss, mesh, ({'w': {0: parallel.Strip('pipe', 4, 4)}}, None))
  whole, piped = (kron.curvature(f, params, x, fisher='empirical') for f in (loss, spread))
  a, b = (jax.jit(c.value_and_grad)(params, x)[2].means('w') for c in (whole, piped))
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=2e-5, atol=1e-7), a, b)
  outside = parallel.partition(lambda w, x: (x @ w[0]).sum(), mesh, ({0: parallel.Strip('pipe', 4, 4)}, None))
  with pytest.raises(parallel.PartitionError, match=r"lies over 'pipe'"):
    outside(params['w'], x)
