"""Updates whose tree is not the one that `kron.curvature` read: recognised, or refused by name; never plain descent."""

import dataclasses
import functools

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from kronmesh import kron, parallel
from tests.draws import normal, normals

X, Y = normal(32, 4), jnp.arange(32) % 3
SHAPES = {'a': (4, 5), 'b': (5, 3)}
PARAMS = normals(SHAPES)


def loss_fn(p, x, y):
  z = kron.observe.categorical(jnp.tanh(x @ p['a']) @ p['b'], y)
  return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


CURVATURE = kron.curvature(loss_fn, PARAMS, X, Y, fisher='exact')
OPTIMIZERS = {
  'kfac': functools.partial(kron.kfac, 0.1),
  'ekfac': functools.partial(kron.ekfac, 0.1),
  'kfac_adam': functools.partial(kron.kfac_adam, 0.1),
  'stale_kfac': functools.partial(kron.stale_kfac, 0.1),
  'adaptive_kfac': kron.adaptive_kfac,
  'natural_gradient': lambda c: kron.natural_gradient(0.1, damping=0.1, preconditioner=kron.scale_by_kfac(c)),
}


@functools.cache
def measured():
  return jax.jit(CURVATURE.value_and_grad)(PARAMS, X, Y)


def step(tx, wrap=lambda t: t):
  """The updates of a first step; gradients, parameters and statistics as they come."""
  loss, grads, _ = measured()
  params = wrap(PARAMS)
  state = tx.init(params)
  basis = None
  if any(
    isinstance(s, kron.ScaleByEkfacState) for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, 'moments'))
  ):
    basis = kron.basis(state, CURVATURE)
  stats = jax.jit(lambda: CURVATURE.value_and_grad(PARAMS, X, Y, basis=basis))()[2]

  @jax.jit
  def update(grads, state, params):
    more = {'products': CURVATURE.products(PARAMS, X, Y, fisher='exact'), 'value': loss, 'value_fn': lambda p: loss}
    return tx.update(grads, state, params, stats=stats, **more)[0]

  return update(wrap(grads), state, params)


@flax.struct.dataclass
class Data:
  b: jax.Array  # not in the order of a dictionary's keys
  a: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=['b', 'a'], meta_fields=[])
@dataclasses.dataclass
class Plain:
  b: jax.Array
  a: jax.Array


class Module(eqx.Module):
  b: jax.Array
  a: jax.Array


CLOTHES = {
  'another root': (lambda t: {'params': t}, lambda t: t['params']),
  'two roots': (lambda t: {'net': {'params': t}}, lambda t: t['net']['params']),
  'in a list': (lambda t: [t], lambda t: t[0]),
  'FrozenDict': (FrozenDict, dict),
  'flax dataclass': (lambda t: Data(**t), lambda t: {'a': t.a, 'b': t.b}),
  'dataclass': (lambda t: Plain(**t), lambda t: {'a': t.a, 'b': t.b}),
  'equinox module': (lambda t: Module(**t), lambda t: {'a': t.a, 'b': t.b}),
  'nnx State': (lambda t: nnx.State(jax.tree.map(nnx.Param, t)), lambda t: {k: t[k][...] for k in t}),
  'list, known by its shapes': (lambda t: [t['a'], t['b']], lambda t: {'a': t[0], 'b': t[1]}),
}


@pytest.mark.brief('dataclass', 'flax dataclass')
@pytest.mark.parametrize('clothes', CLOTHES)
def test_the_same_parameters_in_other_clothes(clothes):
  wrap, unwrap = CLOTHES[clothes]
  right, found = step(kron.kfac(0.1, CURVATURE)), step(kron.kfac(0.1, CURVATURE), wrap)
  assert jax.tree.structure(found) == jax.tree.structure(wrap(PARAMS))
  jax.tree.map(np.testing.assert_array_equal, unwrap(found), right)


@pytest.mark.long
@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('clothes', ['flax dataclass', 'another root', 'nnx State'])
def test_every_optimiser_knows_its_parameters(name, clothes):
  wrap, unwrap = CLOTHES[clothes]
  right, found = step(OPTIMIZERS[name](CURVATURE)), step(OPTIMIZERS[name](CURVATURE), wrap)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), unwrap(found), right)


@pytest.mark.long
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_one_vector_of_all_parameters(name):
  right, found = step(OPTIMIZERS[name](CURVATURE)), step(optax.flatten(OPTIMIZERS[name](CURVATURE)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, right)


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('broken', ['lacks', 'renamed', 'more', 'transposed'])
def test_a_tree_without_a_parameter_is_refused_by_name(name, broken):
  wrap, message = {
    'lacks': (lambda t: {'a': t['a']}, r"the update lacks 'b', a parameter of the curvature \(it has a\)"),
    'renamed': (lambda t: {'a': t['a'], 'c': t['b'], 'd': t['b']}, r"the update has 'c', which is not a parameter"),
    'more': (
      lambda t: {**t, 'c': t['b']},
      r"the update has 'c', which is not a parameter of the curvature \(it has a, b\)",
    ),
    'transposed': (lambda t: {'a': t['a'].T, 'b': t['b']}, r"'a' has shape \(5, 4\) in the update and \(4, 5\)"),
  }[broken]
  with pytest.raises(kron.CurvatureError, match=message):
    step(OPTIMIZERS[name](CURVATURE), wrap)


def test_an_order_that_is_not_sure_is_refused():
  """Two parameters of one shape in a list: nothing says which is which."""

  def loss(p, x):
    return (kron.observe.gaussian(jnp.tanh(x @ p['a']) @ p['b']) ** 2).sum(-1).mean()

  params = normals({'a': (4, 4), 'b': (4, 4)})
  tx = kron.kfac(0.1, kron.curvature(loss, params, X, fisher='exact'))
  with pytest.raises(kron.CurvatureError, match="the update has '0', which is not a parameter"):
    tx.init([params['b'], params['a']])


@pytest.mark.long
def test_masked_parameters_are_another_transformations():
  mask = {'a': True, 'b': False}
  masked = step(optax.masked(kron.scale_by_kfac(CURVATURE), mask))
  right, grads = step(kron.scale_by_kfac(CURVATURE)), measured()[1]
  np.testing.assert_array_equal(masked['a'], right['a'])
  np.testing.assert_array_equal(masked['b'], grads['b'])
  apart = {'k': kron.scale_by_kfac(CURVATURE), 's': optax.identity()}
  divided = step(optax.partition(apart, {'a': 'k', 'b': 's'}))
  jax.tree.map(np.testing.assert_array_equal, divided, masked)
  rooted = step(optax.masked(kron.scale_by_kfac(CURVATURE), {'net': {'params': mask}}), CLOTHES['two roots'][0])
  jax.tree.map(np.testing.assert_array_equal, rooted['net']['params'], masked)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.z, self.a = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    return self.a(jnp.tanh(self.z(x)))


@pytest.mark.brief('pure-kfac')
@pytest.mark.parametrize('name', ['kfac', 'kfac_adam', 'stale_kfac'])
@pytest.mark.parametrize('read', ['state', 'pure', 'module'])
def test_nnx_optimizer_takes_the_step_of_the_transformation(name, read):
  net = Net(nnx.Rngs(0))
  graph, state = nnx.split(net, nnx.Param)
  params = {'state': state, 'pure': nnx.to_pure_dict(state), 'module': net}[read]

  def loss(params, x, y):
    model = params if read == 'module' else nnx.merge(graph, params)
    if read == 'pure':
      nnx.replace_by_pure_dict(like := nnx.state(net, nnx.Param), params)
      model = nnx.merge(graph, like)
    z = kron.observe.categorical(model(x), y)
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

  curvature = kron.curvature(loss, params, X, Y, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, X, Y)
  tx = OPTIMIZERS[name](curvature)
  right, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  before = jax.tree.map(jnp.copy, nnx.state(net, nnx.Param))
  grads = grads if read != 'pure' else jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(grads))
  optimizer.update(net, grads, stats=stats)
  moved = jax.tree.map(jnp.subtract, nnx.state(net, nnx.Param), before)
  for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_flax_train_state_takes_the_step_of_the_transformation():
  tx = kron.kfac(0.1, CURVATURE)
  _, grads, stats = measured()
  state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
  # TrainState hands over no more than gradients: the statistics go in beside it.
  updates, opt_state = tx.update(grads, state.opt_state, state.params, stats=stats)
  state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
  right = optax.apply_updates(PARAMS, step(tx))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.params, right)


@pytest.mark.brief('stale_kfac')
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_update_that_hears_nothing_of_statistics_is_refused(name):
  """As flax's TrainState calls it: the step would be plain descent."""
  tx = OPTIMIZERS[name](CURVATURE)
  grads = measured()[1]
  more = {'products': CURVATURE.products(PARAMS, X, Y, fisher='exact'), 'value': 0.0, 'value_fn': lambda p: 0.0}
  state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
  if name not in ('adaptive_kfac', 'natural_gradient'):
    with pytest.raises(kron.CurvatureError, match='update was given no stats='):
      state.apply_gradients(grads=grads)
  with pytest.raises(kron.CurvatureError, match='update was given no stats='):
    tx.update(grads, state.opt_state, PARAMS, **more)
  tx.update(grads, state.opt_state, PARAMS, stats=None, **more)


@pytest.mark.long('kfac_adam', 'stale_kfac')
@pytest.mark.parametrize('name', ['kfac', 'ekfac', 'kfac_adam', 'stale_kfac'])
def test_multisteps_is_refused_as_it_drops_statistics(name):
  tx = optax.MultiSteps(OPTIMIZERS[name](CURVATURE), 2)
  _, grads, stats = measured()
  state = tx.init(PARAMS)
  with pytest.raises(kron.CurvatureError, match='MultiSteps hands over the statistics of the last microbatch alone'):
    jax.jit(tx.update)(grads, state, PARAMS, stats=stats)
  if name != 'ekfac':
    beside = optax.chain(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), OPTIMIZERS[name](CURVATURE))
    jax.jit(beside.update)(grads, beside.init(PARAMS), PARAMS, stats=stats)


def test_a_leaf_that_is_no_array_is_refused_by_name():
  class Model(eqx.Module):
    a: jax.Array
    axis_name: str = 'batch'

  loss = lambda m, x: jnp.sum(kron.observe.gaussian(x @ m.a, x) ** 2)  # noqa: E731
  with pytest.raises(
    kron.CurvatureError, match=r'parameters hold \.axis_name: str, which is not an array; .*eqx.partition'
  ):
    kron.curvature(loss, Model(jnp.eye(4)), X)
  with pytest.raises(kron.CurvatureError, match=r'arguments of the loss hold \[0\]'):
    kron.curvature(loss_fn, PARAMS, 'train', Y)


@pytest.mark.parametrize('name', ['kfac', 'ekfac', 'kfac_adam', 'stale_kfac'])
def test_a_state_of_other_devices_is_refused(name):
  """The plain state of one device on four, and back; `to_logical` is the way, and the message says so."""
  mesh = jax.make_mesh((4,), ('data',), devices=jax.devices()[:4])
  placement = parallel.Placement(mesh)
  curvature = kron.curvature(loss_fn, PARAMS, X, Y, fisher='exact', placement=placement)
  one, four = OPTIMIZERS[name](CURVATURE), OPTIMIZERS[name](curvature, placement=placement)
  _, grads, stats = CURVATURE.value_and_grad(PARAMS, X, Y)
  for tx, other in ((one, four), (four, one)):
    with pytest.raises(kron.CurvatureError, match=r'laid out for other devices.*kron.to_logical'):
      tx.update(grads, other.init(PARAMS), PARAMS, stats=stats)


def test_counters_move_the_targets_that_are_drawn():
  """Random state may be a key that stays and a count that grows, as in flax.nnx."""

  def loss(p, key, count, x, y):
    del count
    return loss_fn(p, x + 0 * jax.random.normal(key), y)

  key = jax.random.key(0)
  curvature = kron.curvature(loss, PARAMS, key, jnp.uint32(0), X, Y)
  drawn = [curvature.value_and_grad(PARAMS, key, jnp.uint32(i), X, Y)[2].means('b')['G'] for i in (0, 0, 1)]
  assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
