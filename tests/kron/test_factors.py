"""Factors equal those from explicit per-example gradients, for every operator and every way to write it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh import kron
from kronmesh.kron.operators.factor import gram as gram_of
from kronmesh.kron.operators.factor import multiply, rotate, split
from tests.draws import normal
from tests.kron.reference import close, gram, input_rows

KEY = jax.random.key(0)


def statistics_of(linear, x, kernel, bias=None, fisher='empirical'):
  """Statistics of one operator under a fixed nonlinear loss, and the loss's own dy (for the summed loss)."""
  y_shape = jax.eval_shape(linear, x, kernel)
  direction = jax.random.normal(jax.random.key(7), y_shape.shape)

  def tail(y):
    return (jnp.sin(y + 0.3) * direction).sum() / x.shape[0]

  def loss(params, x):
    y = linear(x, params['kernel'])
    return tail(y + params['bias'] if 'bias' in params else y)

  params = {'kernel': kernel} if bias is None else {'kernel': kernel, 'bias': bias}
  curvature = kron.curvature(loss, params, x, fisher=fisher, examples=x.shape[0])
  value, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  plain_value, plain = jax.jit(jax.value_and_grad(loss))(params, x)
  assert value == plain_value
  jax.tree.map(np.testing.assert_array_equal, grads, plain)
  y = linear(x, kernel) + (0 if bias is None else bias)
  return stats, jax.grad(tail)(y) * x.shape[0]


DENSE = {
  'matmul': (lambda x, w: x @ w, (5, 3), (3, 4), (-1,)),
  'kernel on the left': (lambda x, w: jnp.einsum('oi,bi->bo', w, x), (5, 3), (4, 3), (-1,)),
  'transposed': (lambda x, w: x @ w.T, (5, 3), (4, 3), (-1,)),
  'sequence': (lambda x, w: jnp.einsum('bti,io->bto', x, w), (5, 6, 3), (3, 4), (-1,)),
  'heads': (lambda x, w: jnp.einsum('bti,ihk->bthk', x, w), (5, 6, 3), (3, 2, 4), (-2, -1)),
  'out of heads': (lambda x, w: jnp.einsum('bthk,hko->bto', x, w), (5, 6, 2, 4), (2, 4, 3), (-1,)),
  'rank 5': (lambda x, w: x @ w, (2, 2, 3, 2, 3), (3, 4), (-1,)),
  'reshaped kernel': (lambda x, w: x @ w.reshape(6, 4), (5, 6), (2, 3, 4), (-1,)),
  'scaled kernel': (lambda x, w: x @ (0.5 * w), (5, 3), (3, 4), (-1,)),
  'one output': (lambda x, w: x @ w, (5, 3), (3, 1), (-1,)),
}


@pytest.mark.long('rank 5')
@pytest.mark.parametrize('case', DENSE)
def test_dense(case):
  linear, x_shape, w_shape, out_axes = DENSE[case]
  x, w = jax.random.normal(KEY, x_shape), jax.random.normal(jax.random.key(1), w_shape)
  stats, dy = statistics_of(linear, x, w)
  rows = input_rows(linear, x, w, out_axes)
  n_out = np.prod([dy.shape[a] for a in out_axes])
  close(stats.sums['kernel']['A'][0], gram(rows), 1e-5)
  close(stats.sums['kernel']['G'][0], gram(dy.reshape(-1, n_out)), 1e-5)
  assert stats.uses['kernel']['A'] == rows.shape[0] and stats.examples == x.shape[0]


def test_a_bias_appends_a_one_to_the_input():
  linear, x_shape, w_shape, _ = DENSE['heads']
  x, w = jax.random.normal(KEY, x_shape), jax.random.normal(jax.random.key(1), w_shape)
  stats, _ = statistics_of(linear, x, w, bias=jnp.ones((2, 4)))
  rows = input_rows(linear, x, w, (-2, -1))
  close(stats.sums['kernel']['A'][0], gram(np.concatenate([rows, np.ones((30, 1))], 1)), 1e-5)


def conv(stride, padding, dilation, spatial, input_dilation=1):
  letters = 'DHW'[-spatial:]
  numbers = (f'N{letters}C', f'{letters}IO', f'N{letters}C')
  return lambda x, w: jax.lax.conv_general_dilated(
    x,
    w,
    (stride,) * spatial,
    padding,
    (input_dilation,) * spatial,
    (dilation,) * spatial,
    dimension_numbers=numbers,
  )


CONVOLUTIONS = {
  'spatial': st.integers(1, 3),
  'stride': st.integers(1, 3),
  'dilation': st.integers(1, 2),
  'input_dilation': st.integers(1, 2),
  'window': st.integers(1, 3),
  'size': st.integers(5, 6),
  'padding': st.sampled_from(['SAME', 'VALID', 'asymmetric', 'causal']),
  'bias': st.booleans(),
}


@settings(max_examples=4, deadline=None)
@given(**CONVOLUTIONS)
def test_conv(**case):
  check_conv(**case)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(**CONVOLUTIONS)
def test_many_convs(**case):
  check_conv(**case)


def check_conv(spatial, stride, dilation, input_dilation, window, size, padding, bias):
  explicit = {'asymmetric': [(0, 2)] * spatial, 'causal': [(2, 0)] * spatial}
  if input_dilation > 1 and padding in ('SAME', 'VALID'):
    explicit[padding] = [(window // 2, window // 2)] * spatial
  linear = conv(stride, explicit.get(padding, padding), dilation, spatial, input_dilation)
  x = jax.random.normal(KEY, (2, *(size,) * spatial, 2))
  w = jax.random.normal(jax.random.key(1), (*(window,) * spatial, 2, 3))
  stats, dy = statistics_of(linear, x, w, jnp.full((3,), 0.1) if bias else None)
  # Patches by XLA's own operator (channels outermost there, innermost here).
  letters = 'DHW'[-spatial:]
  patches = jax.lax.conv_general_dilated_patches(
    x,
    (window,) * spatial,
    (stride,) * spatial,
    explicit.get(padding, padding),
    (input_dilation,) * spatial,
    (dilation,) * spatial,
    dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
  )
  rows = patches.reshape(-1, 2, window**spatial).swapaxes(1, 2).reshape(-1, 2 * window**spatial)
  if bias:
    rows = jnp.concatenate([rows, jnp.ones((rows.shape[0], 1))], 1)
  close(stats.sums['kernel']['A'][0], gram(rows), 1e-5)
  close(stats.sums['kernel']['G'][0], gram(dy.reshape(-1, 3)), 1e-5)


def per_example_unit(norm, params, x, tail):
  """Sum over examples of (ds, db)(ds, db)T, from one copy of scale and shift for each example."""
  copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (x.shape[0], *(1,) * (x.ndim - 2), p.size)), params)
  grads = jax.grad(lambda copies: tail(norm(copies, x)) * x.shape[0])(copies)
  u = np.stack([np.asarray(grads[k], np.float64).reshape(x.shape[0], -1) for k in grads if k in params], -1)
  return np.einsum('bci,bcj->cij', u, u)


def batch_norm(p, x):
  axes = tuple(range(x.ndim - 1))
  x = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)
  return x * p['scale'] + p['shift']


def layer_norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * p['scale'] + p['shift']


def folded_norm(p, x):
  """Scale meets the batch-free deviation first, as flax writes it."""
  axes = tuple(range(x.ndim - 1))
  factor = jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5) * p['scale']
  return (x - x.mean(axes)) * factor + p['shift']


def divided_norm(p, x):
  axes = tuple(range(x.ndim - 1))
  return p['scale'] * (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) + p['shift']


def gemma_norm(p, x):
  x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * (1 + p['scale'])


def twice_read(p, x):
  """The result is read twice, as by a gated activation."""
  y = layer_norm(p, x)
  return y * jax.nn.sigmoid(y)


def scale_times_itself(p, x):
  y = gemma_norm(p, x)
  return y * jax.nn.sigmoid(y)


def shift_alone(p, x):
  return jnp.tanh(x) + p['shift']


def subtracted(p, x):
  return p['scale'] * x - p['shift']


def negative_shift(p, x):
  return -(2 * p['shift']) + jnp.tanh(x)


NORMS = {
  f.__name__: f
  for f in (
    batch_norm, layer_norm, folded_norm, divided_norm, gemma_norm, twice_read, scale_times_itself, shift_alone,
    subtracted, negative_shift,
  )
}  # fmt: skip


@pytest.mark.brief(
  'scale_times_itself-flat',
  'gemma_norm-image',
  'shift_alone-flat',
  'divided_norm-flat',
  'subtracted-flat',
  'twice_read-image',
  'negative_shift-flat',
  'layer_norm-flat',
)
@pytest.mark.parametrize('shape', [(6, 3), (6, 4, 5, 3)], ids=['flat', 'image'])
@pytest.mark.parametrize('name', NORMS)
def test_scale_and_shift(name, shape):
  norm = NORMS[name]
  x = jax.random.normal(KEY, shape) * 2 + 1
  direction = jax.random.normal(jax.random.key(7), shape)

  def tail(y):
    return (jnp.sin(y) * direction).sum() / shape[0]

  names = [n for n in ('scale', 'shift') if f"p['{n}']" in _source(norm)]
  params = {n: jax.random.normal(jax.random.key(i), (3,)) for i, n in enumerate(names)}
  curvature = kron.curvature(lambda p, x: tail(norm(p, x)), params, x, fisher='empirical', examples=shape[0])
  # Whole networks are compared bit for bit in test_programs.py; here XLA may fuse the only two readers of dy otherwise.
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  plain = jax.jit(jax.grad(lambda p, x: tail(norm(p, x))))(params, x)
  jax.tree.map(lambda a, b: close(a, b, 1e-6), grads, plain)
  expected = per_example_unit(norm, params, x, tail)
  if len(stats.sums) == 1:
    (block,) = stats.sums.values()
    close(block['F'], expected, 2e-5)
  else:  # a shift that is not simply added is a block of its own
    assert name == 'subtracted'
    for i, n in enumerate(names):
      close(stats.sums[n]['F'][:, 0, 0], expected[:, i, i], 2e-5)


def _source(fn):
  import inspect

  text = inspect.getsource(fn)
  for other in (layer_norm, gemma_norm):
    if fn is not other and f'{other.__name__}(' in text:
      text += inspect.getsource(other)
  return text


def test_a_kernel_under_batch_norm_is_seen_through_coupled_examples():
  """G under BatchNorm: dy of every example's own copy of the layer's output, other examples' losses included."""
  x, w = jax.random.normal(KEY, (8, 5)), jax.random.normal(jax.random.key(1), (5, 3))
  norm = {'scale': jnp.ones(3) * 1.5, 'shift': jnp.ones(3) * 0.1}

  def loss(params, x, offset=0.0):
    y = batch_norm(params, x @ params['kernel'] + offset)
    return jnp.sin(y * jnp.arange(1.0, 4.0)).sum() / 8

  params = {'kernel': w, **norm}
  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical', examples=8).value_and_grad)(params, x)[2]
  dy = jax.grad(loss, argnums=2)(params, x, jnp.zeros((8, 3))) * 8
  close(stats.sums['kernel']['G'][0], gram(dy), 1e-5)


def test_bf16_statistics_are_summed_in_f32():
  linear = lambda x, w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)  # noqa: E731
  x, w = jax.random.normal(KEY, (512, 3)), jax.random.normal(jax.random.key(1), (3, 4))
  stats, _ = statistics_of(linear, x, w)
  assert stats.sums['kernel']['A'].dtype == jnp.float32
  close(stats.sums['kernel']['A'][0], gram(x.astype(jnp.bfloat16)), 1e-5)


def test_flax_layers_with_masks_and_auxiliary_outputs():
  net = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
  x, labels = jax.random.normal(KEY, (8, 4)), jnp.arange(8) % 3
  params = jax.jit(net.init)(KEY, x)['params']
  mask = jnp.array([True] * 5 + [False] * 3)

  def loss(params, x, labels, mask):
    logits = kron.observe.categorical(net.apply({'params': params}, x), labels, mask=mask)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
    return (nll * mask).sum() / mask.sum(), {'logits': logits}

  masked = kron.curvature(loss, params, x, labels, mask, fisher='exact', has_aux=True)
  (_, aux), _, stats = jax.jit(masked.value_and_grad)(params, x, labels, mask)
  _, _, part = jax.jit(masked.value_and_grad)(params, x[:5], labels[:5], mask[:5])
  assert aux['logits'].shape == (8, 3) and stats.examples == 5
  for block in stats.sums:
    close(stats.sums[block]['G'], part.sums[block]['G'], 1e-5)


@pytest.mark.long
def test_microbatches_add_up_to_the_batch():
  net = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(3)])
  x = jax.random.normal(KEY, (12, 4))
  params = jax.jit(net.init)(KEY, x)['params']

  def loss(params, x):
    return 0.5 * (kron.observe.gaussian(net.apply({'params': params}, x)) ** 2).sum(-1).mean()

  for fisher in ('exact', 'empirical'):
    curvature = kron.curvature(loss, params, x, fisher=fisher)
    whole = curvature.value_and_grad(params, x)[2]
    parts = kron.accumulate(*(curvature.value_and_grad(params, part)[2] for part in jnp.split(x, [3, 7])))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), parts, whole)


def test_blocks_by_choice_are_those_of_the_whole_factors():
  params, x = {'w': normal(6, 8), 'v': normal(8, 4, seed=2)}, normal(10, 6, seed=3)

  def loss(params, x):
    z = kron.observe.gaussian(jnp.tanh(x @ params['w']) @ params['v'])
    return 0.5 * (z**2).sum(-1).mean()

  whole = kron.curvature(loss, params, x, fisher='exact')
  cut = kron.curvature(loss, params, x, fisher='exact', blocks={'w': {'G': 4}, 'v': {'A': 2, 'G': 2}})
  assert '4 blocks of 2x2' in str(cut) and '2 blocks of 4x4' in str(cut)
  means, found = (jax.jit(c.value_and_grad)(params, x)[2] for c in (whole, cut))
  for name, side, parts in (('w', 'G', 4), ('v', 'A', 2), ('v', 'G', 2)):
    m = np.asarray(means.means(name)[side][0])
    n = len(m) // parts
    np.testing.assert_allclose(
      found.means(name)[side], [m[k * n : k * n + n, k * n : k * n + n] for k in range(parts)], rtol=1e-5
    )
  close(found.means('w')['A'], means.means('w')['A'], 1e-6)


CANNOT_BE = [
  ({'w': {'B': 2}}, "name 'A', 'G' or both"),
  ({'w': {'A': 0}}, 'a number of blocks'),
  ({'q': {'A': 2}}, 'matches no parameter'),
]


@pytest.mark.parametrize('blocks, words', CANNOT_BE)
def test_blocks_that_cannot_be_are_one_line(blocks, words):
  loss = lambda p, x: kron.observe.gaussian(x @ p['w']).mean()  # noqa: E731
  with pytest.raises(kron.CurvatureError, match=words):
    kron.curvature(loss, {'w': normal(3, 2)}, normal(4, 3), blocks=blocks)


@pytest.mark.parametrize('size, largest', [(5, 5), (5, 1), (5, 2), (6, 3)])
def test_a_factor_in_diagonal_blocks_is_that_of_its_dense_matrix(size, largest):
  """The gram matrix, the product with an inverse, and the rotation into a basis, with two slots."""
  factor = split(2, size, largest)
  rows, v = normal(2, 7, size), normal(2, size, 3, seed=1)
  blocks = np.asarray(gram_of(factor, rows))
  assert blocks.shape == (factor.rows, factor.n, factor.n)
  dense = np.zeros((2, factor.parts * factor.n, factor.parts * factor.n), np.float32)
  for i, block in enumerate(blocks):
    at = i % factor.parts * factor.n
    dense[i // factor.parts, at : at + factor.n, at : at + factor.n] = block
  dense = dense[:, :size, :size]
  products = np.einsum('sri,srj->sij', rows, rows)
  close(dense, np.where(dense != 0, products, 0), 1e-6)
  assert largest < size or (dense != 0).all()
  close(multiply(factor, jnp.asarray(blocks), v), np.einsum('sij,sjk->sik', dense, v), 1e-6)
  close(rotate(factor, jnp.asarray(blocks), rows), np.einsum('sri,sij->srj', rows, dense), 1e-6)
