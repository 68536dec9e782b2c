"""Messages along a graph's links, in one part or several, with K-FAC's factors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import data, kron, models, parallel
from kronmesh.models.graphs import DECODE, GraphEncoder
from tests.draws import integers, normal

NODES, RELATIONS, WIDTH = 27, 3, 4


@functools.cache
def links():
  rng = np.random.default_rng(0)
  found = np.stack([rng.integers(0, n, 60) for n in (NODES, RELATIONS, NODES)], 1).astype(np.int32)
  return np.unique(found, axis=0)


def graph(parts, found=None):
  found = links() if found is None else found
  both = data.both_directions(found, RELATIONS)
  return models.Graph(*data.partitioned(NODES, both, parts), relations=2 * RELATIONS)


def drawn(tree, dtype):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten([normal(*x.shape, seed=i, scale=0.5).astype(dtype) for i, x in enumerate(leaves)])


@pytest.mark.long('1-0', '1-2', '3-0')
@pytest.mark.parametrize('bases', [0, 2])
@pytest.mark.parametrize('parts', [1, 3])
def test_an_encoder_is_the_formula(x64, parts, bases):
  """h_i' = relu(W h_i + b + sum_r mean over neighbours of W_r h_j), Schlichtkrull et al. 2018, eq. 2; W_r by eq. 3."""
  model = GraphEncoder(graph(parts), WIDTH, 2, bases, dtype=jnp.float64)
  variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))
  params = drawn(variables.pop('params'), jnp.float64)
  found = jax.jit(model.apply)({'params': params, **variables})
  h = np.asarray(params['entities']['embedding'])
  both = data.both_directions(links(), RELATIONS)
  for layer in range(2):
    kernel = np.asarray(params[f'related_{layer}']['kernel'])
    if bases:
      kernel = np.einsum('rb,ibo->rio', params[f'bases_{layer}']['kernel'], kernel.reshape(WIDTH, bases, WIDTH))
    kernel = kernel.reshape(2 * RELATIONS, WIDTH, WIDTH)
    new = np.asarray(h @ params[f'own_{layer}']['kernel'] + params[f'own_{layer}']['bias']).copy()
    for i in range(NODES):
      for r in range(2 * RELATIONS):
        sent = [h[s] @ kernel[r] for s, kind, t in both if (kind, t) == (r, i)]
        new[i] += np.mean(sent, 0) if sent else 0
    h = new if layer else np.maximum(new, 0)
  np.testing.assert_allclose(found, h, rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_a_noun_takes_the_places_that_fit_it(x64):
  """softmax(keys q / sqrt(d)) over places and times, of the features before logits; q of a node of unit size."""
  model = models.DirectedVideo(graph(1), 5, (4, 8), WIDTH, groups=2, dtype=jnp.float64)
  clips, nodes = normal(3, 4, 8, 16, 1), jnp.array([2, 0, 11])
  variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), clips))
  params = drawn(variables.pop('params'), jnp.float64)
  apply = jax.jit(functools.partial(model.apply, capture_intermediates=True))
  found, state = apply({'params': params, **variables}, clips, nodes)
  made = {name: own['__call__'][0] for name, own in state['intermediates'].items() if name != '__call__'}
  node = np.asarray(made['encoder'])[nodes]
  node = node / np.sqrt((node**2).mean(-1, keepdims=True) + 1e-6)
  x = np.asarray(nn.gelu(made['norm_1'])).reshape(3, -1, 8)
  layer = lambda name, x: x @ params[name]['kernel'] + params[name]['bias']  # noqa: E731
  for clip in range(3):
    fit = np.exp(layer('keys', x[clip]) @ layer('asked', node[clip]) / 2)  # sqrt(4)
    np.testing.assert_allclose(found[clip], layer('logits', fit @ x[clip] / fit.sum()), rtol=1e-9)


def test_complex_products_are_those_of_complex_numbers():
  e, r, o = (normal(5, 6, seed=i) for i in range(3))
  as_complex = lambda x: x[:, :3] + 1j * x[:, 3:]  # noqa: E731
  expected = (as_complex(e) * as_complex(r) * as_complex(o).conj()).sum(-1).real
  np.testing.assert_allclose((DECODE['complex'](e, r) * o).sum(-1), expected, rtol=1e-5, atol=1e-6)


def curvature_of(parts, dtype, decoder, layers, bases, placement=None):
  model = models.LinkPredictor(graph(parts), WIDTH, 2 * RELATIONS, decoder, layers, bases, dtype)
  x = jnp.stack([integers(NODES, 16), integers(2 * RELATIONS, 16)], 1)
  label = integers(NODES, 16, seed=3)
  variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), x))
  params = drawn(variables.pop('params'), dtype)

  def loss(params, state, x, label):
    logits = kron.observe.categorical(model.apply({'params': params, **state}, x).astype(dtype), label)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

  return loss, params, variables, x, label


@pytest.mark.long
@pytest.mark.parametrize('decoder, layers, bases', [('complex', 0, 0), ('distmult', 2, 0), ('complex', 1, 2)])
def test_a_graph_over_devices_is_the_whole_graph(x64, decoder, layers, bases):
  """Loss, gradients and factors; of activations, only nodes that other parts read are gathered before the decoder."""

  def statistics(parts, mesh):
    loss, params, state, *batch = curvature_of(parts, jnp.float64, decoder, layers, bases)
    placement = parallel.Placement(mesh)

    def on_mesh(*args):
      with parallel.logical_axes(parallel.RULES['link_predictor'], mesh):
        return loss(*args)

    curvature = kron.curvature(on_mesh, params, state, *batch, fisher='empirical', placement=placement)
    assert not any('diagonal' in b.operator.name for b in curvature.blocks)
    lying = parallel.batch_sharding(mesh, len(batch[0]))

    def apart(path, _):
      by_part = path[-1].key not in ('part', 'place')
      return parallel.batch_sharding(mesh, parts) if by_part else parallel.replicated(mesh)

    where = (parallel.replicated(mesh), jax.tree_util.tree_map_with_path(apart, state), lying, lying)
    fn = jax.jit(curvature.value_and_grad, in_shardings=where)
    value, grads, stats = fn(params, state, *batch)
    return value, grads, {name: stats.means(name) for name in kron.param_names(params) if name in stats.sums}

  one = parallel.make_mesh('data=1', jax.devices()[:1])
  expected, found = statistics(1, one), statistics(8, parallel.make_mesh('data=8'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.long
def test_every_layer_has_factors():
  loss, params, state, *batch = curvature_of(1, jnp.float32, 'distmult', 2, 2)
  curvature = kron.curvature(loss, params, state, *batch, fisher='empirical')
  named = {b.operator.name for b in curvature.blocks}
  assert named == {'dense', 'embedding'}
  classes = models.ZeroShot(graph(1), (0, 1, 2), (4, 8), WIDTH, 2)
  images = normal(8, 8, 8, 1)
  variables = nn.meta.unbox(jax.jit(classes.init)(jax.random.key(0), images))
  params = variables.pop('params')

  def of_images(params, state, x, label):
    logits = kron.observe.categorical(classes.apply({'params': params, **state}, x), label)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

  curvature = kron.curvature(of_images, params, variables, images, integers(3, 8), fisher='empirical')
  assert {b.operator.name for b in curvature.blocks} >= {'dense', 'embedding', 'conv'}


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'decoder': 'transe'}, "decoder='transe' is unknown; choose from distmult, complex"),
    ({'width': 5}, 'width=5 of complex features must be even'),
  ],
)
def test_unknown_settings_are_named(settings, words):
  model = models.LinkPredictor(**{'graph': graph(1), 'width': 4, 'relations': 6, **settings})
  with pytest.raises(ValueError, match=words):
    model.init(jax.random.key(0), jnp.zeros((2, 2), jnp.int32))
