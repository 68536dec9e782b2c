"""Operators in all their forms, against the unrolled reference; and random compositions of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.gallery import N, cross_entropy, labels, layer_norm, squared, tokens
from tests.kron.reference import close
from tests.kron.unrolled import check

VOCABULARY = 11


def conv(p, x, layout=('NHWC', 'HWIO', 'NHWC'), **options):
  options = {'window_strides': (1, 1), 'padding': 'SAME'} | options
  return jax.lax.conv_general_dilated(x, p['w'], dimension_numbers=layout, **options)


OPERATORS = {
  'experts': (lambda p, x: jnp.einsum('bei,eio->beo', x, p['w']), (3, 4, 2), (3, 4)),
  'experts, kernel first': (lambda p, x: jnp.einsum('eoi,bei->beo', p['w'], x), (3, 2, 4), (3, 4)),
  'experts in the middle': (lambda p, x: jnp.einsum('bie,oei->boe', x, p['w']), (2, 3, 4), (4, 3)),
  'two batch axes': (lambda p, x: jnp.einsum('bdei,deio->bedo', x, p['w']), (2, 3, 4, 2), (2, 3, 4)),
  'contracted twice': (lambda p, x: jnp.einsum('bhwc,whco->bo', x, p['w']), (2, 3, 4, 2), (3, 2, 4)),
  'heads': (lambda p, x: jnp.einsum('btc,chd->bhtd', x, p['w']), (4, 2, 3), (5, 4)),
  'out of heads': (lambda p, x: jnp.einsum('bhtd,hdc->btc', x, p['w']), (2, 3, 4), (2, 5, 3)),
  'kernel repeated for each example': (
    lambda p, x: jnp.einsum('bi,bio->bo', x, jnp.broadcast_to(p['w'], (N, 4, 2))), (4, 2), (4,)
  ),
  'kernel by vmap': (lambda p, x: jax.vmap(jax.vmap(lambda x: p['w'] @ x))(x), (2, 4), (3, 4)),
  'ensemble by vmap': (lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w))(p['w']).swapaxes(0, 1), (3, 4, 2), (4,)),
  'groups': (lambda p, x: conv(p, x, feature_group_count=2), (3, 2, 2, 4), (4, 3, 4)),
  'depthwise': (lambda p, x: conv(p, x, feature_group_count=4), (3, 3, 1, 4), (4, 3, 4)),
  'depthwise, twice the channels': (lambda p, x: conv(p, x, feature_group_count=4), (2, 2, 1, 8), (4, 3, 4)),
  'groups, channels first, strided': (
    lambda p, x: conv(p, x, ('NCHW', 'OIHW', 'NCHW'), feature_group_count=2, window_strides=(2, 1)), (4, 2, 2, 3), (4, 4, 3)
  ),
  'dilated groups': (
    lambda p, x: conv(p, x, feature_group_count=2, rhs_dilation=(2, 1), lhs_dilation=(1, 2), padding=[(1, 1), (0, 1)]),
    (2, 2, 2, 4), (4, 3, 4),
  ),
  'kernels by vmap': (
    lambda p, x: jax.vmap(lambda w: conv({'w': w}, x))(p['w']).swapaxes(0, 1), (3, 2, 2, 4, 2), (3, 3, 4)
  ),
  'transposed convolution': (
    lambda p, x: jax.lax.conv_transpose(x, p['w'], (2, 2), 'SAME'), (3, 3, 4, 2), (3, 3, 4)
  ),
  'spectral scale': (lambda p, x: x @ (p['w'] / jnp.linalg.norm(p['w'])), (4, 3), (4,)),
  'a mask of weights': (lambda p, x: x @ (p['w'] * (jnp.arange(12).reshape(4, 3) % 5 > 0)), (4, 3), (4,)),
}  # fmt: skip


@pytest.mark.brief('kernel by vmap', 'experts, kernel first', 'depthwise')
@pytest.mark.parametrize('name', OPERATORS)
def test_linear_operators(name):
  operator, w_shape, x_shape = OPERATORS[name]
  params, x = {'w': normal(*w_shape, scale=0.5)}, normal(N, *x_shape, seed=2)
  loss = lambda p, x: squared(jnp.sin(operator(p, x)))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='empirical')
  assert len(curvature.blocks) == 1 and 'A' in curvature.blocks[0].operator.factors, str(curvature)
  if name == 'a mask of weights':  # the rule: statistics of the effective weight, whose zeros are entries too
    plainly = kron.curvature(lambda p, x: squared(jnp.sin(x @ p['w'])), params, x, fisher='empirical')
    masked = {'w': params['w'] * (jnp.arange(12).reshape(4, 3) % 5 > 0)}
    jax.tree.map(
      lambda a, b: close(a, b, 1e-5), curvature.value_and_grad(params, x)[2], plainly.value_and_grad(masked, x)[2]
    )
  else:
    check(curvature, loss, params, (x,), N)
  tx = kron.scale_by_kfac(curvature)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  assert updates['w'].shape == w_shape and np.isfinite(updates['w']).all()


LOOKUPS = {
  'indexing': lambda e, ids: e[ids],
  'take': lambda e, ids: jnp.take(e, ids, axis=0),
  'take, clipped': lambda e, ids: jnp.take(e, ids + 5, axis=0, mode='clip'),
  'take of a transposed table': lambda e, ids: jnp.take(e.T, ids, axis=1).transpose(1, 2, 0),
  'vmap': lambda e, ids: jax.vmap(jax.vmap(lambda i: e[i]))(ids),
  'dynamic_index': lambda e, ids: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(e, i, 0, False)))(ids),
  'negative numbers': lambda e, ids: e[-ids],
  'one_hot': lambda e, ids: jax.nn.one_hot(ids, VOCABULARY) @ e,
  'one_hot by einsum': lambda e, ids: jnp.einsum('btv,vc->btc', jax.nn.one_hot(ids, VOCABULARY, dtype=jnp.float32), e),
}


@pytest.mark.long('take of a transposed table', 'vmap')
@pytest.mark.parametrize('name', LOOKUPS)
def test_embeddings_keep_a_diagonal_of_counts(name):
  params, ids = {'e': normal(VOCABULARY, 4)}, tokens()
  loss = lambda p, ids: squared(jnp.sin(LOOKUPS[name](p['e'], ids)))  # noqa: E731
  curvature = kron.curvature(loss, params, ids, fisher='empirical')
  assert 'diagonal of 11' in str(curvature), str(curvature)
  check(curvature, loss, params, (ids,), N)


def test_an_id_outside_of_the_table_counts_for_nothing():
  params, ids = {'e': normal(VOCABULARY, 4)}, tokens().at[0, 0].set(VOCABULARY + 3)
  loss = lambda p, ids: squared(jnp.nan_to_num(jnp.take(p['e'], ids, axis=0, mode='fill', fill_value=0.0)))  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, ids, fisher='empirical').value_and_grad)(params, ids)[2]
  counts = np.bincount(np.asarray(ids).reshape(-1), minlength=VOCABULARY)[:VOCABULARY]
  close(stats.sums['e']['A'].reshape(-1), counts, 1e-6)


FREE = {
  'class token': (lambda p, x: jnp.concatenate([jnp.broadcast_to(p['w'], (N, 1, 4)), x], 1), (4,)),
  'class token by tile': (lambda p, x: jnp.concatenate([jnp.tile(p['w'], (N, 1, 1)), x], 1), (1, 1, 4)),
  'positions': (lambda p, x: x + p['w'], (5, 4)),
  'positions, the first of many': (lambda p, x: x + p['w'][: x.shape[1]], (8, 4)),
  'positions by look-up': (lambda p, x: x + p['w'][jnp.arange(5)][None], (8, 4)),
  'layer scale': (lambda p, x: x * p['w'], (4,)),
  'temperature': (lambda p, x: x / p['w'], ()),
  'temperature by exp': (lambda p, x: x * jnp.exp(p['w']), ()),
  'temperature by softplus': (lambda p, x: x / jax.nn.softplus(p['w']), ()),
  'gate': (lambda p, x: jax.nn.sigmoid(p['w']) * x, (4,)),
  'slope': (lambda p, x: jnp.where(x > 0, x, p['w'] * x), (4,)),
  'exponent': (lambda p, x: jnp.abs(x) ** p['w'], ()),
  'mask token': (lambda p, x: jnp.where(x[..., :1] > 0.5, p['w'], x), (4,)),
  'one minus': (lambda p, x: x * (1 - p['w']), (4,)),
}


@pytest.mark.long('class token', 'class token by tile', 'positions')
@pytest.mark.parametrize('name', FREE)
def test_free_parameters(name):
  """F is the diagonal of the sum of squared gradients of the examples' own copies."""
  network, shape = FREE[name]
  params, x = {'w': jnp.abs(normal(*shape)) + 0.3}, normal(N, 5, 4)
  loss = lambda p, x: squared(jnp.sin(network(p, x)))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='empirical')
  stats = jax.jit(curvature.value_and_grad)(params, x)[2]

  def alone(i):
    return jax.grad(lambda p: squared(jnp.sin(network(p, jnp.broadcast_to(x[i], x.shape)))[:1]))(params)['w']

  expected = sum(np.asarray(alone(i), np.float64) ** 2 for i in range(N))
  (block,) = curvature.blocks
  (found,) = block.operator.from_matrix(stats.sums['w']['F'][..., 0])
  close(found, expected, 1e-4)


def weight_norm(p, x):
  return x @ (p['v'] * (p['g'] / jnp.linalg.norm(p['v'], axis=0)))


def test_weight_norm_is_a_kernel_with_gains():
  """F of the gain by one gradient for each example; the kernel's G is that of its own columns' scale."""
  params, x = {'v': normal(4, 3), 'g': jnp.array([0.5, 1.5, -1.0])}, normal(N, 4, seed=2)
  loss = lambda p, x: squared(jnp.sin(weight_norm(p, x)))  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  each = [jax.grad(loss)(params, x[i : i + 1])['g'] for i in range(N)]
  close(stats.sums['g']['F'][:, 0, 0], sum(np.asarray(g) ** 2 for g in each), 1e-5)
  y = weight_norm(params, x)
  dy = jax.grad(lambda y: squared(jnp.sin(y)) * N)(y) * (params['g'] / jnp.linalg.norm(params['v'], axis=0))
  close(stats.sums['v']['G'][0], dy.T @ dy, 1e-5)
  close(stats.sums['v']['A'][0], x.T @ x, 1e-5)


# --- compositions --------------------------------------------------------------------------------------------------


def dense(draw, p, h, k):
  p[f'w{k}'] = (h.shape[-1], draw(st.integers(3, 4)))
  bias = draw(st.booleans())
  if bias:
    p[f'b{k}'] = p[f'w{k}'][1:]
  return lambda p, h: h @ p[f'w{k}'] + (p[f'b{k}'] if bias else 0.0)


def norm(draw, p, h, k):
  del draw
  p[f's{k}'], p[f't{k}'] = (h.shape[-1],), (h.shape[-1],)
  return lambda p, h: layer_norm(h, p[f's{k}'], p[f't{k}'])


def grouped(draw, p, h, k):
  """A convolution along the second axis, in one, two or all channels' groups."""
  channels = h.shape[-1]
  groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
  p[f'c{k}'] = (draw(st.integers(1, 3)), channels // groups, channels)
  stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
  return lambda p, h: jax.lax.conv_general_dilated(
    h, p[f'c{k}'], (stride,), 'SAME', None, (dilation,), ('NWC', 'WIO', 'NWC'), groups
  )


def experts(draw, p, h, k):
  n = draw(st.integers(2, 3))
  p[f'e{k}'] = (n, h.shape[-1], 3)
  return lambda p, h: jnp.einsum('btc,ecd->btd', h, p[f'e{k}'])


def stacked(draw, p, h, k):
  """Layers in a scan."""
  length = draw(st.integers(2, 3))
  p[f'l{k}'] = (length, h.shape[-1], h.shape[-1])
  return lambda p, h: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p[f'l{k}'])[0]


def repeated(draw, p, h, k):
  """One layer after itself, and transposed where drawn."""
  p[f'r{k}'] = (h.shape[-1], h.shape[-1])
  back = draw(st.booleans())
  return lambda p, h: jnp.tanh(h @ p[f'r{k}']) @ (p[f'r{k}'].T if back else p[f'r{k}'])


def positions(draw, p, h, k):
  del draw
  p[f'p{k}'] = h.shape[1:]
  return lambda p, h: h + p[f'p{k}']


LAYERS = (dense, norm, grouped, stacked, repeated, positions)
WRAPPERS = {
  'plain': lambda f: f,
  'jit': jax.jit,
  'remat': jax.checkpoint,
  'remat with a policy': lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
  'cond': lambda f: lambda p, h: jax.lax.cond(True, f, f, p, h),
}


@st.composite
def programs(draw):
  """A random network: its function, shapes of parameters, and a shape of inputs."""
  x_shape = (draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([3, 4])))
  shapes, functions = {}, []
  h = jnp.zeros((N, *x_shape))
  for k in range(draw(st.integers(1, 3))):
    layer = draw(st.sampled_from(LAYERS))(draw, shapes, h, k)
    wrapper = draw(st.sampled_from(sorted(WRAPPERS)))
    activation = draw(st.sampled_from([jnp.tanh, jax.nn.relu, jax.nn.silu]))
    function = WRAPPERS[wrapper](lambda p, h, layer=layer, activation=activation: activation(layer(p, h)))
    functions.append(function)
    h = jax.eval_shape(function, {k: jnp.zeros(s) for k, s in shapes.items()}, h)

  def network(p, x):
    for function in functions:
      x = function(p, x)
    return x.mean(1) @ p['out']

  return network, shapes | {'out': (h.shape[-1], 3)}, x_shape


def check_program(program):
  network, shapes, x_shape = program
  params, x = normals(shapes), normal(N, *x_shape)
  loss = lambda p, x, y: cross_entropy(network(p, x), y)  # noqa: E731
  curvature = kron.curvature(loss, params, x, labels(), fisher='empirical')
  assert not curvature.gradient_only
  _, grads, _ = jax.jit(curvature.value_and_grad)(params, x, labels())
  expected = jax.jit(jax.grad(loss))(params, x, labels())
  # Units that are off for every example have no curvature to compare.
  assume(all(float(jnp.linalg.norm(g)) > 0 for g in jax.tree.leaves(expected)))
  scale = float(optax.global_norm(expected))  # a norm of two channels has hardly any gradient of its own
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), grads, expected)
  check(curvature, loss, params, (x, labels()), N)


@settings(max_examples=1, deadline=None)
@given(programs())
def test_random_programs(program):
  check_program(program)


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(programs())
def test_many_random_programs(program):
  check_program(program)


def rounded(w):
  """Straight through, and by nothing."""
  return w + jax.lax.stop_gradient(1.0 * w - w)


ORDERS = {
  'rows': (lambda x, w, order: x @ w[order], lambda w, order: w[order]),
  'columns': (lambda x, w, order: x @ w[:, order], lambda w, order: w[:, order]),
  'both': (lambda x, w, order: x @ w[order][:, order], lambda w, order: w[order][:, order]),
  'taken': (lambda x, w, order: x @ jnp.take(w, jnp.asarray(order), axis=0), lambda w, order: w[order]),
  'in a scan': (
    lambda x, w, order: jax.lax.scan(lambda h, v: (h @ v[order], None), x, w[None])[0], lambda w, order: w[order],
  ),
  'and cast': (lambda x, w, order: x @ (1.0 * w[order]).astype(jnp.float32), lambda w, order: w[order]),
  'and masked': (lambda x, w, order: x @ jnp.where(np.ones((4, 4), bool), w[order], 0), lambda w, order: w[order]),
  'and turned': (lambda x, w, order: jnp.einsum('ni,oi->no', x, w[order].T), lambda w, order: w[order]),
  'and folded': (
    lambda x, w, order: jnp.einsum('nab,abo->no', x.reshape(-1, 2, 2), w[order].reshape(2, 2, 4)),
    lambda w, order: w[order],
  ),
  'and rounded': (lambda x, w, order: x @ rounded(w[order]), lambda w, order: w[order]),
  'in a remat': (lambda x, w, order: jax.checkpoint(lambda x, w: x @ w[order])(x, w), lambda w, order: w[order]),
}  # fmt: skip


@pytest.mark.brief(
  'and cast-4',
  'both-6',
  'and masked-4',
  'in a scan-6',
  'and turned-4',
  'and folded-4',
  'columns-4',
  'in a remat-6',
  'and rounded-4',
)
@pytest.mark.parametrize('n', [4, 6])  # as many examples as rows, and another number
@pytest.mark.parametrize('name', ORDERS)
def test_kernels_in_another_order(name, n):
  """A constant permutation of a kernel: the update is that of the permuted kernel, put back."""
  x, order, w = normal(n, 4), np.array([2, 0, 3, 1]), normal(4, 4)
  used, moved = ORDERS[name]
  updates = []
  for loss, params in (
    (lambda p, x: squared(used(x, p['w'], order)), {'w': w}),
    (lambda p, x: squared(x @ p['w']), {'w': moved(w, order)}),
  ):
    curvature = kron.curvature(loss, params, x, fisher='empirical')
    assert curvature.blocks[0].operator.name == 'dense'
    tx = kron.scale_by_kfac(curvature, damping=0.1)
    _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
    updates.append(tx.update(grads, tx.init(params), params, stats=stats)[0]['w'])
  close(moved(updates[0], order), updates[1], 1e-4)


@pytest.mark.parametrize('between', [lambda h: h, lambda h: 2.0 * h, lambda h: jnp.tanh(h).reshape(4, 2, 2).sum(1)])
def test_a_batch_that_the_loss_closes_over_is_no_order(between):
  """Each example looks its own row up, though no two the same."""
  ids, v, weights = np.array([2, 0, 3, 1]), normal(4, 3), jnp.arange(4.0)

  def loss(p, y):
    h = between(p['w'][ids])
    z = kron.observe.gaussian(h @ v[: h.shape[-1]], y)
    return jnp.dot(weights, 0.5 * ((z - y) ** 2).sum(-1)) / weights.sum()

  curvature = kron.curvature(loss, {'w': normal(4, 4)}, normal(4, 3), fisher='empirical')
  assert curvature.blocks[0].operator.name == 'embedding'


def test_an_order_that_is_an_argument_is_refused():
  x, params = normal(6, 4), {'w': normal(4, 3)}
  loss = lambda p, x, order: squared(x @ p['w'][order])  # noqa: E731
  with pytest.raises(kron.CurvatureError, match='whose leading axis has length 4, which does not fit 6 observations'):
    kron.curvature(loss, params, x, jnp.arange(4), fisher='exact')
