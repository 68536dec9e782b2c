"""Models have the sizes of their papers, and every parameter names its axes for the sharding tables."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kronmesh import models, parallel

MODELS = {
  'autoencoder': (models.Autoencoder(widths=(1000, 500, 250, 30)), (2, 28, 28, 1), (2, 784)),
  'mlp': (models.MLP(hidden=(128, 64), classes=10), (2, 8, 8, 1), (2, 10)),
  'resnet': (models.ResNet(blocks=(3, 4, 6, 3), classes=1000, dtype=jnp.bfloat16), (2, 224, 224, 3), (2, 1000)),
  'transformer': (models.Transformer(vocabulary=128, length=65, layers=4, width=256, heads=8), (2, 64), (2, 64, 128)),
  'vit': (models.ViT(classes=1000, dtype=jnp.bfloat16), (2, 224, 224, 3), (2, 1000)),
}
# 784-1000-500-250-30 and back; 64-128-64-10; He et al. 2016 count 25.6 million for ResNet-50.
SIZES = {'autoencoder': 2_837_314, 'mlp': 17_226, 'resnet': 25_557_032}
# 12 d^2 + 13 d a layer (Radford et al. 2019), two tables of tokens, one of positions, the last norm.
# The same without tables; 16x16 patches, 196 positions, the classes: ViT-B/16, its mean in place of a class token.
SIZES['vit'] = 12 * (12 * 768**2 + 13 * 768) + 769 * 1000 + 2 * 768 + (16 * 16 * 3 + 1 + 196) * 768
SIZES['transformer'] = 4 * (12 * 256**2 + 13 * 256) + 2 * 128 * 256 + 65 * 256 + 2 * 256


def shapes(name):
  model = MODELS[name][0]
  return jax.eval_shape(lambda: model.init(jax.random.key(0), inputs(name), train=False))


def inputs(name):
  return jnp.zeros(MODELS[name][1], jnp.int32 if name == 'transformer' else jnp.float32)


@pytest.mark.parametrize('name', MODELS)
def test_sizes_and_types(name):
  model, _, expected = MODELS[name]
  variables = nn.meta.unbox(shapes(name))
  leaves = jax.tree.leaves(variables['params'])
  assert sum(math.prod(leaf.shape) for leaf in leaves) == SIZES[name]
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}
  out = jax.eval_shape(lambda v: model.apply(v, inputs(name), train=False), variables)
  assert out.shape == expected and out.dtype == jnp.float32


@pytest.mark.parametrize('name', MODELS)
def test_the_tables_place_every_parameter(name):
  """At model=2 half of the kernels' entries or more lie on each device, and each fits its table."""
  boxed = shapes(name)
  params = nn.meta.unbox(boxed)['params']
  mesh = parallel.make_mesh('data=4,model=2')
  found = parallel.param_shardings(params, nn.get_partition_spec(boxed)['params'], parallel.RULES[name], mesh)
  local = sum(
    math.prod(sharding.shard_shape(leaf.shape))
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True)
  )
  assert SIZES[name] / 2 <= local < 0.6 * SIZES[name]


@pytest.mark.parametrize(
  'stem, bottleneck', [('small', False), ('small', True), ('patches', False), ('imagenet', False), ('imagenet', True)]
)
def test_a_toy_resnet_trains_its_statistics(stem, bottleneck):
  model = models.ResNet(blocks=(1, 1), classes=3, width=4, bottleneck=bottleneck, stem=stem)
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  variables = nn.meta.unbox(model.init(jax.random.key(0), x))
  out, state = model.apply(variables, x, train=True, mutable=['batch_stats'])
  assert out.shape == (4, 3)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state['batch_stats'], variables['batch_stats'])
  assert all(jax.tree.leaves(moved))


def test_a_resnet_of_clips():
  """A 3-D ResNet-18 has Hara et al.'s (2018) 33.2 million parameters and 400 classes; its stem keeps frames."""
  model = models.ResNet(blocks=(2, 2, 2, 2), classes=400, bottleneck=False)
  clip = jnp.zeros((2, 8, 32, 32, 3))
  variables = nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), clip)))
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(variables['params'])]
  assert 33.1e6 < sum(sizes) - 513 * 400 < 33.3e6
  seen = jax.eval_shape(lambda v: model.apply(v, clip, capture_intermediates=True)[1]['intermediates'], variables)
  assert seen['stem']['__call__'][0].shape == (2, 8, 16, 16, 64)


def test_a_vision_transformer_names_a_patch_that_does_not_divide():
  with pytest.raises(ValueError, match=r'patch=\(16, 16\) does not divide inputs of \(24, 32\)'):
    models.ViT(classes=3).init(jax.random.key(0), jnp.zeros((1, 24, 32, 3)))


def test_a_transformer_does_not_see_what_comes_later():
  model = models.Transformer(vocabulary=11, length=8, layers=2, width=16, heads=2)
  tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 11)
  variables = nn.meta.unbox(model.init(jax.random.key(1), tokens))
  logits = model.apply(variables, tokens)
  changed = model.apply(variables, tokens.at[:, 5].set((tokens[:, 5] + 1) % 11))
  moved = jnp.abs(logits - changed).max((0, 2)) > 0
  assert not moved[:5].any() and moved[5:].all()
  with pytest.raises(ValueError, match='9 tokens is longer than length=8'):
    model.apply(variables, jnp.zeros((1, 9), jnp.int32))
