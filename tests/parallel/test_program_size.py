"""A program does not grow with the devices it runs on, nor with layers of equal shape in a scan."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kronmesh import kron, parallel
from tests.draws import normal

ROOT = Path(__file__).parents[2]


def on_devices(devices, name):
  command = [sys.executable, '-m', 'tests.parallel.program_size', str(devices), name]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize('name', ['mlp', 'transformer', 'resnet'])
def test_512_devices_compile_what_8_do(name):
  few, many = on_devices(8, name), on_devices(512, name)
  assert many['lowered'] <= 1.2 * few['lowered'] and many['compiled'] <= 1.2 * few['compiled']


@pytest.mark.parametrize('inverses', ['everywhere', 'owners'])
def test_layers_of_equal_shape_in_a_scan_cost_nothing_more(inverses):
  mesh = parallel.make_mesh('data=4,model=2')
  placement = parallel.Placement(mesh, inverses, row_sharded=False)

  def loss_fn(params, x):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params['layers'])
    return 0.5 * (kron.observe.gaussian(h) ** 2).sum(-1).mean()

  sizes = []
  for layers in (4, 32):
    params = {'layers': normal(layers, 12, 12)}
    x = jax.device_put(normal(16, 12), NamedSharding(mesh, PartitionSpec('data')))
    curvature = kron.curvature(loss_fn, params, x, fisher='empirical', placement=placement)
    tx = kron.kfac(0.1, curvature, placement=placement)

    def step(params, state, x, curvature=curvature, tx=tx):
      _, grads, stats = curvature.value_and_grad(params, x)
      return tx.update(grads, state, params, stats=stats)

    lowered = jax.jit(step).lower(params, jax.eval_shape(tx.init, params), x)
    sizes.append(lowered.as_text().count(' = '))
  assert sizes[1] <= 1.02 * sizes[0], sizes
