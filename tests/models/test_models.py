"""Models have the sizes of their papers, and every parameter names its axes for the sharding tables."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from kronmesh import kron, models, parallel

MODELS = {
  'autoencoder': (models.Autoencoder(widths=(1000, 500, 250, 30)), (2, 28, 28, 1), (2, 784)),
  'mlp': (models.MLP(hidden=(128, 64), classes=10), (2, 8, 8, 1), (2, 10)),
  'r2plus1d': (models.R2Plus1D((2, 2, 2, 2), 400), (2, 16, 112, 112, 3), (2, 400)),
  'resnet': (models.ResNet(blocks=(3, 4, 6, 3), classes=1000, dtype=jnp.bfloat16), (2, 224, 224, 3), (2, 1000)),
  'transformer': (models.Transformer(vocabulary=128, length=65, layers=4, width=256, heads=8), (2, 64), (2, 64, 128)),
  'video_transformer': (models.VideoTransformer(400, layers=2, dtype=jnp.bfloat16), (2, 8, 224, 224, 3), (2, 400)),
  'vit': (models.ViT(classes=1000, dtype=jnp.bfloat16), (2, 224, 224, 3), (2, 1000)),
}
# 784-1000-500-250-30 and back; 64-128-64-10; He et al. 2016 count 25.6 million for ResNet-50; R(2+1)D-18 for Kinetics has
# 31,505,325 in torchvision too.
SIZES = {'autoencoder': 2_837_314, 'mlp': 17_226, 'resnet': 25_557_032}
# 12 d^2 + 13 d a layer (Radford et al. 2019), two tables of tokens, one of positions, the last norm.
# The same without tables; 16x16 patches, 196 positions, the classes: ViT-B/16, its mean in place of a class token.
SIZES['vit'] = 12 * (12 * 768**2 + 13 * 768) + 769 * 1000 + 2 * 768 + (16 * 16 * 3 + 1 + 196) * 768
SIZES['r2plus1d'] = 31_505_325
# Another attention and another norm in each layer; patches of two frames.
SIZES['video_transformer'] = 2 * (16 * 768**2 + 19 * 768) + 769 * 400 + 2 * 768 + (2 * 16 * 16 * 3 + 1 + 196) * 768
SIZES['transformer'] = 4 * (12 * 256**2 + 13 * 256) + 2 * 128 * 256 + 65 * 256 + 2 * 256


def shapes(name):
  model = MODELS[name][0]
  return jax.eval_shape(lambda: model.init(jax.random.key(0), inputs(name), train=False))


def inputs(name):
  return jnp.zeros(MODELS[name][1], jnp.int32 if name == 'transformer' else jnp.float32)


@pytest.mark.long('resnet', 'vit')
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
  model = MODELS[name][0]
  if name == 'r2plus1d':  # whose sizes do not divide else
    model = model.clone(multiple=2)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs(name), train=False))
  params = nn.meta.unbox(boxed)['params']
  mesh = parallel.make_mesh('data=4,model=2')
  found = parallel.param_shardings(params, nn.get_partition_spec(boxed)['params'], parallel.RULES[name], mesh)
  local = sum(
    math.prod(sharding.shard_shape(leaf.shape))
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True)
  )
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert size / 2 <= local < 0.6 * size and size - SIZES[name] < 1e-3 * size


@pytest.mark.long
@pytest.mark.parametrize(
  'stem, bottleneck', [('small', False), ('small', True), ('patches', False), ('imagenet', False), ('imagenet', True)]
)
def test_a_toy_resnet_trains_its_statistics(stem, bottleneck):
  model = models.ResNet(blocks=(1, 1), classes=3, width=4, bottleneck=bottleneck, stem=stem)
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), x))
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
  variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), tokens))
  apply = jax.jit(model.apply)
  logits = apply(variables, tokens)
  changed = apply(variables, tokens.at[:, 5].set((tokens[:, 5] + 1) % 11))
  moved = jnp.abs(logits - changed).max((0, 2)) > 0
  assert not moved[:5].any() and moved[5:].all()
  with pytest.raises(ValueError, match='9 tokens is longer than length=8'):
    model.apply(variables, jnp.zeros((1, 9), jnp.int32))


def video(**settings):
  model = models.VideoTransformer(
    3, (8, 8), layers=2, width=24, heads=2, window=4, causal=True, each_frame=True, **settings
  )
  x = jax.random.normal(jax.random.key(0), (2, 12, 16, 16, 3))
  return model, x, nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), x))


@pytest.mark.long
@pytest.mark.parametrize('pieces', [[1] * 12, [5, 1, 6], [2, 10], [12]], ids=str)
@pytest.mark.parametrize('depth', [1, 3])
def test_a_stream_equals_its_clip(depth, pieces):
  """In any pieces, and in memory that does not grow."""
  model, x, variables = video(depth=depth)
  step = jax.jit(lambda stream, x: model.apply({**variables, **stream}, x, stream=True, mutable=['stream']))
  stream, found, sizes = {}, [], set()
  for piece in jnp.split(x, [sum(pieces[: i + 1]) for i in range(len(pieces) - 1)], 1):
    logits, stream = step(stream, piece)
    found.append(logits)
    sizes.add(sum(leaf.size for leaf in jax.tree.leaves(stream)))
  assert jnp.abs(jnp.concatenate(found, 1) - model.apply(variables, x)).max() < 1e-5
  # Three frames of keys and values of two layers, what patches reach back, and counts.
  assert sizes == {2 * 2 * (2 * 3 * 4 * 24 + 1) + (2 * (depth - 1) * 16 * 16 * 3 + 1)}


VIDEO = {
  'r2plus1d': models.R2Plus1D((1, 1), 3, width=4, stem='small', dtype=jnp.bfloat16),
  'resnet': models.ResNet(blocks=(1, 1), classes=3, width=4, bottleneck=False, stem='small', dtype=jnp.bfloat16),
  'video_transformer': models.VideoTransformer(3, (4, 4), layers=2, width=16, heads=2, dtype=jnp.bfloat16),
}


@pytest.mark.long('r2plus1d')
@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.long] * (i > 0)) for i, n in enumerate(VIDEO)])
def test_video_models_in_bfloat16_have_factors_whatever_is_kept(name):
  """Every kernel is Kronecker-factored; what the backward pass computes again is what it was, but for rounding."""
  x = jax.random.normal(jax.random.key(0), (6, 4, 8, 8, 1))
  batch = {'inputs': x, 'label': jnp.arange(6) % 3}
  variables = nn.meta.unbox(VIDEO[name].init(jax.random.key(1), x, train=False))
  params, found = variables.pop('params'), {}
  for keep in ('all', 'blocks'):
    model = VIDEO[name].clone(keep=keep)

    def loss(params, batch, model=model):
      logits, _ = model.apply({'params': params, **variables}, batch['inputs'], train=True, mutable=list(variables))
      logits = kron.observe.categorical(logits, batch['label'])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    curvature = kron.curvature(loss, params, batch, fisher='empirical')
    for block in curvature.blocks:
      assert block.operator.name != 'diagonal' and not block.sampled_diagonal and not block.partial
    assert {p for b in curvature.blocks for p in b.params} == set(kron.param_names(params))
    found[keep] = jax.jit(curvature.value_and_grad)(params, batch)
  for one, other in zip(*(jax.tree.leaves(found[keep]) for keep in ('all', 'blocks')), strict=True):
    assert (
      jnp.isfinite(one).all() and jnp.linalg.norm(one - other) <= 8 * 2**-8 * jnp.linalg.norm(one) + 1e-6
    )  # 8 units


@pytest.mark.long
def test_a_causal_model_sees_its_window_alone():
  """Each of two layers reaches three frames back, and a patch one."""
  model, x, variables = video()
  moved = jnp.abs(model.apply(variables, x.at[:, 2].add(1.0)) - model.apply(variables, x)).max((0, 2)) > 1e-7
  assert moved.tolist() == [2 <= t <= 2 + 3 + 3 + 1 for t in range(12)]


def test_a_stream_needs_a_causal_model_with_a_window():
  x = jnp.zeros((1, 2, 16, 16, 3))
  for settings in ({'causal': True}, {'window': 4}):
    model = models.VideoTransformer(3, (8, 8), layers=1, width=8, heads=1, **settings)
    with pytest.raises(ValueError, match='causal=True and a window can be streamed'):
      model.init(jax.random.key(0), x, stream=True)
  with pytest.raises(ValueError, match=r'patch=\(8, 8\) does not divide frames of \(12, 16\)'):
    model.init(jax.random.key(0), jnp.zeros((1, 2, 12, 16, 3)))


@pytest.mark.long
@pytest.mark.parametrize('causal', [False, True])
def test_a_video_transformer_tells_the_order_of_frames(causal):
  model = models.VideoTransformer(3, (8, 8), depth=1, layers=1, width=16, heads=2, causal=causal)
  x = jax.random.normal(jax.random.key(0), (2, 6, 16, 16, 3))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  first, second = (model.apply(variables, y) for y in (x, jnp.concatenate([x[:, :5][:, ::-1], x[:, 5:]], 1)))
  assert jnp.abs(first - second).max() > 1e-4
