"""Whole programs: gradients are the plain program's, bit for bit, and factors do not depend on how it was written."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kronmesh import kron, models
from tests.kron.reference import close

KEY = jax.random.key(0)


def cross_entropy(logits, labels):
  logits = kron.observe.categorical(logits, labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def images(n=8, size=8, channels=3):
  k = jax.random.split(KEY)
  return jax.random.normal(k[0], (n, size, size, channels)), jax.random.randint(k[1], (n,), 0, 5)


# --- one network, three frameworks ---------------------------------------------------------------------------------


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3), strides=2, padding='SAME', name='conv')(x))
    x = nn.LayerNorm(name='norm')(x.reshape(x.shape[0], -1))
    return nn.Dense(5, name='dense')(x)


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 6, (3, 3), strides=2, padding='SAME', rngs=rngs)
    self.norm = nnx.LayerNorm(96, rngs=rngs)
    self.dense = nnx.Linear(96, 5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv(x))
    return self.dense(self.norm(x.reshape(x.shape[0], -1)))


def plain_net(params, x):
  conv, norm, dense = params['conv'], params['norm'], params['dense']
  x = jax.lax.conv_general_dilated(x, conv['kernel'], (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  x = jnp.maximum(x + conv['bias'], 0).reshape(x.shape[0], -1)
  centred = x - x.mean(-1, keepdims=True)
  x = centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm['scale'] + norm['bias']
  return x @ dense['kernel'] + dense['bias']


def frameworks():
  """Name -> (network(params, x), params), all with the same numbers."""
  x, _ = images()
  linen = LinenNet()
  params = jax.jit(linen.init)(KEY, x)['params']
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), params)
  graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
  nnx.replace_by_pure_dict(state, params)
  return {
    'linen': (lambda p, x: linen.apply({'params': p}, x), params),
    'nnx': (lambda p, x: nnx.merge(graph, p)(x), state),
    'plain': (plain_net, params),
  }


@pytest.mark.long
def test_one_network_in_three_frameworks():
  """flax.linen, flax.nnx and plain JAX: the same blocks with the same factors."""
  x, y = images()
  found = {}
  for name, (network, params) in frameworks().items():
    curvature = kron.curvature(lambda p, x, y, net=network: cross_entropy(net(p, x), y), params, x, y, fisher='exact')
    _, _, stats = jax.jit(curvature.value_and_grad)(params, x, y)
    assert len(curvature.blocks) == 3 and not curvature.gradient_only, str(curvature)
    found[name] = {block.removesuffix('/value'): factors for block, factors in stats.sums.items()}
  for name in ('nnx', 'plain'):
    assert found[name].keys() == found['linen'].keys()
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found[name], found['linen'])


# --- bitwise gradients ---------------------------------------------------------------------------------------------


def resnet(dtype, bottleneck):
  model = models.ResNet(blocks=(1, 1), classes=5, width=4, bottleneck=bottleneck, stem='small', dtype=dtype)
  x, y = images()
  variables = nn.meta.unbox(model.init(KEY, x, train=False))
  params = variables.pop('params')

  def loss(params, x, y):
    logits, state = model.apply({'params': params, **variables}, x, train=True, mutable=['batch_stats'])
    return cross_entropy(logits, y), state

  return loss, params, (x, y), True


def framework(name):
  network, params = frameworks()[name]
  return lambda p, x, y: cross_entropy(network(p, x), y), params, images(), False


def autoencoder():
  model = models.Autoencoder(widths=(12, 6))
  x, _ = images(channels=1)
  params = nn.meta.unbox(jax.jit(model.init)(KEY, x))['params']

  def loss(params, x):
    logits = kron.observe.bernoulli(model.apply({'params': params}, x))
    return optax.sigmoid_binary_cross_entropy(logits, jax.nn.sigmoid(x.reshape(logits.shape))).sum(-1).mean()

  return loss, params, (x,), False


NETWORKS = {
  'linen': lambda: framework('linen'),
  'nnx': lambda: framework('nnx'),
  'plain': lambda: framework('plain'),
  'autoencoder': autoencoder,
  'resnet f32': lambda: resnet(jnp.float32, False),
  'resnet bf16': lambda: resnet(jnp.bfloat16, False),
  'bottleneck bf16': lambda: resnet(jnp.bfloat16, True),
}


# The larger networks compile for long: one Fisher each in `make test`, the others in `make test-all`.
BRIEF = {('resnet f32', 'empirical'), ('resnet bf16', 'sampled')}
CASES = [
  pytest.param(
    name, fisher, marks=[pytest.mark.long] * ('bf16' in name or 'f32' in name) * ((name, fisher) not in BRIEF)
  )
  for name in NETWORKS
  for fisher in ('empirical', 'sampled')
]


@pytest.mark.long(
  'autoencoder-empirical',
  'resnet f32-empirical',
  'resnet bf16-sampled',
  'linen-empirical',
  'nnx-sampled',
  'plain-empirical',
)
@pytest.mark.parametrize('name, fisher', CASES)
def test_gradients_with_probes_are_the_plain_ones_bit_for_bit(name, fisher):
  loss, params, batch, has_aux = NETWORKS[name]()
  curvature = kron.curvature(loss, params, *batch, fisher=fisher, has_aux=has_aux)
  assert not curvature.gradient_only, str(curvature)
  value, grads, _ = jax.jit(curvature.value_and_grad)(params, *batch, key=KEY)
  expected_value, expected = jax.jit(jax.value_and_grad(loss, has_aux=has_aux))(params, *batch)
  jax.tree.map(np.testing.assert_array_equal, (value, grads), (expected_value, expected))


# --- ways to write a program ---------------------------------------------------------------------------------------


def layer(w, b, h):
  return jnp.tanh(h @ w + b)


def written_plainly(params, x):
  return layer(params['v'], params['c'], layer(params['w'], params['b'], x))


@jax.custom_jvp
def tanh(x):
  return jnp.tanh(x)


tanh.defjvps(lambda t, y, x: t * (1 - y**2))


def under_custom_jvp(params, x):
  h = tanh(x @ params['w'] + params['b'])
  return tanh(h @ params['v'] + params['c'])


def with_a_transposed_copy(params, x):
  """Moved and reshaped parameters, as checkpoints of other programs hold them."""
  w = params['w'].T.reshape(-1).reshape(params['w'].shape[::-1]).T
  return layer(params['v'], params['c'].reshape(1, -1), layer(w, params['b'][None], x))


WRITINGS = {
  'jit': lambda p, x: jax.jit(written_plainly)(p, x),
  'nested jit': lambda p, x: jax.jit(lambda p, x: jax.jit(layer)(p['v'], p['c'], jax.jit(layer)(p['w'], p['b'], x)))(
    p, x
  ),
  'remat': lambda p, x: jax.checkpoint(written_plainly)(p, x),
  'remat of a part': lambda p, x: layer(p['v'], p['c'], jax.checkpoint(layer)(p['w'], p['b'], x)),
  'remat in jit in remat': lambda p, x: jax.checkpoint(jax.jit(jax.checkpoint(written_plainly)))(p, x),
  'remat with a policy': lambda p, x: jax.checkpoint(
    written_plainly, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  )(p, x),
  'vmap over examples': lambda p, x: jax.vmap(functools.partial(written_plainly, p))(x),
  'custom_jvp': under_custom_jvp,
  'transposed': with_a_transposed_copy,
  'einsum': lambda p, x: layer(p['v'], p['c'], jnp.tanh(jnp.einsum('ni,io->no', x, p['w']) + p['b'])),
}


@pytest.mark.long('remat with a policy')
@pytest.mark.parametrize('name', WRITINGS)
def test_statistics_do_not_depend_on_how_a_network_is_written(name):
  k = jax.random.split(KEY, 5)
  params = {
    'w': jax.random.normal(k[0], (6, 4)),
    'b': jax.random.normal(k[1], (4,)),
    'v': jax.random.normal(k[2], (4, 3)),
    'c': jax.random.normal(k[3], (3,)),
  }
  x = jax.random.normal(k[4], (10, 6))
  results = []
  for network in (WRITINGS[name], written_plainly):

    def loss(params, x, network=network):
      z = kron.observe.gaussian(network(params, x))
      return 0.5 * (z**2).sum(-1).mean()

    curvature = kron.curvature(loss, params, x, fisher='exact')
    results.append(jax.jit(curvature.value_and_grad)(params, x))
    assert {b.params for b in curvature.blocks} == {('w', 'b'), ('v', 'c')}
  jax.tree.map(lambda a, b: close(a, b, 1e-6), *results)
