"""Kernels by output unit and by their diagonal, against gradients of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.gallery import N, squared
from tests.kron.reference import close

pytestmark = pytest.mark.usefixtures('x64')


def mlp(copies, x):
  (w, b, out), *_ = copies
  return jnp.tanh(x @ w + b) @ out


def experts(copies, x):
  ((w, b, out),) = copies
  return jnp.einsum('bsi,sij->bj', jnp.tanh(jnp.einsum('bi,sij->bsj', x, w) + b), out)


def stacked(copies, x):
  ((w, b, out),) = copies
  return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p[0] + p[1]), None), x, (w, b))[0] @ out


def convolution(copies, x):
  ((w, b, out),) = copies
  numbers = ('NHWC', 'HWIO', 'NHWC')
  x = jax.lax.conv_general_dilated(
    x.reshape(N if len(x) == N else 1, 2, 2, -1), w, (1, 1), 'VALID', dimension_numbers=numbers, feature_group_count=2
  )
  return jnp.tanh(x + b).reshape(len(x), -1) @ out


def looked_up(copies, x):
  (w, b, out), *_ = copies
  return jnp.tanh(w[(10 * x[:, 0]).astype(int) % 5] + b) @ out


def sequence(copies, x):
  """Two uses by every example, each of a copy of its own."""
  return sum(mlp([copy], x[:, 4 * k : 4 * k + 4]) for k, copy in enumerate(copies))


def tied(copies, x):
  """The second use is transposed."""
  (first, b, out), (second, *_) = copies
  h = x @ first + b
  return h @ out, jnp.tanh(h) @ second.T


# network, shapes of w, b and out, of x, the copies, and w's slots, rows and columns
CASES = {
  'dense': (mlp, ((4, 3), (3,), (3, 2)), (4,), 1, (1, 4, 3)),
  'experts': (experts, ((3, 4, 2), (3, 2), (3, 2, 2)), (4,), 1, (3, 4, 2)),
  'layers in a scan': (stacked, ((3, 4, 4), (3, 4), (4, 2)), (4,), 1, (3, 4, 4)),
  'convolution': (convolution, ((2, 2, 2, 6), (6,), (6, 2)), (16,), 1, None),
  'embedding': (looked_up, ((5, 3), (3,), (3, 2)), (1,), 1, (1, 5, 3)),
  'sequence': (sequence, ((4, 3), (3,), (3, 2)), (8,), 2, (1, 4, 3)),
}


def loss_of(network, n_copies, tie=True):
  def loss(params, x):
    out = network([params] * n_copies if tie else params, x)
    return sum(squared(z) for z in jax.tree.leaves(out))

  return loss


def make(case):
  network, shapes, x_shape, n, layout = CASES[case]
  params = tuple(normals(list(shapes)))
  params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
  return network, params, normal(N, *x_shape).astype(jnp.float64), n, layout


def single_gradients(network, params, x, n):
  """By copy and parameter: (examples, ...)."""
  loss = loss_of(network, n, tie=False)
  return jax.jit(jax.vmap(lambda xi: jax.grad(loss)([params] * n, xi[None])))(x)


@pytest.mark.long(
  'dense-diagonal',
  'experts-diagonal',
  'layers in a scan-unit',
  'convolution-unit',
  'embedding-unit',
  'embedding-diagonal',
  'experts-unit',
  'layers in a scan-diagonal',
  'sequence-diagonal',
  'sequence-unit',
)
@pytest.mark.parametrize('approximation', ['unit', 'diagonal'])
@pytest.mark.parametrize('case', CASES)
def test_equals_gradients_of_single_examples(case, approximation):
  network, params, x, n, layout = make(case)
  loss = loss_of(network, n)
  curvature = kron.curvature(loss, params, x, fisher='empirical', examples=N, approximation=approximation)
  _, _, stats = jax.jit(curvature.value_and_grad)(params, x)
  tx = kron.scale_by_kfac(curvature)
  found = kron.factors(jax.jit(tx.update)(params, tx.init(params), stats=stats)[1])
  copies = single_gradients(network, params, x, n)
  block = next(b for b in curvature.blocks if b.name == '0')
  joined = len(block.params) == 2  # the bias is the last row of its kernel
  if case == 'embedding' or approximation == 'diagonal':
    assert f'{block.operator.name} (diagonal)' in str(curvature)
    leaves = lambda c: c[:2] if joined else c[:1]  # noqa: E731
    matrix = sum(np.mean(np.square(jax.vmap(block.operator.to_matrix)(*leaves(c))), 0) for c in copies)
    close(found['0']['F'].reshape(-1), matrix.reshape(-1), 1e-12)
    sums = [sum(float((g**2).mean(0).sum()) for g in leaves(c)) for c in copies]
    close(found['0']['F'].sum(), sum(sums), 1e-12)  # whatever the order of entries
    return
  if layout is None:  # the groups' outputs take turns along the kernel's last axis, two groups of three
    shape = lambda w: w.reshape(N, -1, 6).transpose(0, 2, 1)  # noqa: E731
    bias = lambda b: b.reshape(N, 6, 1)  # noqa: E731
  else:
    s, i, o = layout
    shape = lambda w: w.reshape(N, s, i, o).swapaxes(2, 3).reshape(N, s * o, i)  # noqa: E731
    bias = lambda b: b.reshape(N, s * o, 1)  # noqa: E731
  rows = [np.concatenate([shape(c[0]), *([bias(c[1])] if joined else [])], -1) for c in copies]
  close(found['0']['F'], sum(np.einsum('nmi,nmj->mij', r, r) for r in rows) / N, 1e-12)
  assert f'{block.operator.name} (unit-wise)' in str(curvature)


@pytest.mark.parametrize('approximation', ['unit', 'diagonal'])
def test_a_transposed_use_adds_its_own(approximation):
  params = (normal(4, 3), normal(3), normal(3, 2))
  params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
  x = normal(N, 4).astype(jnp.float64)
  curvature = kron.curvature(
    loss_of(tied, 2), params, x, fisher='empirical', examples=N, approximation={'0': approximation}
  )
  _, _, stats = jax.jit(curvature.value_and_grad)(params, x)
  (first, b, _), (second, *_) = single_gradients(tied, params, x, 2)
  found = stats.sums['0']['F'] / N
  block = next(block for block in curvature.blocks if block.name == '0')
  assert 'also transposed' in str(curvature) and block.params == ('0', '1')
  rows = [np.concatenate([first, b[:, None]], 1), np.concatenate([second, 0 * b[:, None]], 1)]
  expected = sum(np.einsum('nio,njo->oij', r, r) for r in rows) / N
  if approximation == 'diagonal':
    expected = np.diagonal(expected, axis1=1, axis2=2).reshape(-1, 1, 1)
  close(found, expected, 1e-12)


@pytest.mark.brief('diagonal')
@pytest.mark.parametrize('approximation', ['unit', 'diagonal'])
def test_reduce_sums_over_the_uses_first(approximation):
  w, x = normal(4, 3).astype(jnp.float64), normal(N, 5, 4).astype(jnp.float64)
  loss = lambda p, x: squared(jnp.tanh(x @ p['w']).sum(1))  # noqa: E731
  settings = {'approximation': approximation, 'sharing': 'reduce', 'fisher': 'empirical', 'examples': N}
  curvature = kron.curvature(loss, {'w': w}, x, **settings)
  _, _, stats = jax.jit(curvature.value_and_grad)({'w': w}, x)
  slope = jax.vmap(lambda xi: jax.grad(lambda y: squared(jnp.tanh(y).sum(0)[None]))(xi @ w))(x).sum(1)
  rows = np.einsum('ni,no->noi', x.mean(1), slope)
  expected = np.einsum('noi,noj->oij', rows, rows) / N
  if approximation == 'diagonal':
    expected = np.diagonal(expected, axis1=1, axis2=2).reshape(-1, 1, 1)
  close(stats.sums['w']['F'] / N, expected, 1e-12)


@pytest.mark.brief('scale_by_ekfac-unit')
@pytest.mark.parametrize('approximation', ['unit', 'diagonal'])
@pytest.mark.parametrize('link', [kron.scale_by_kfac, kron.scale_by_ekfac])
def test_the_update_solves_the_damped_system(approximation, link):
  network, params, x, n, _ = make('dense')
  curvature = kron.curvature(
    loss_of(network, n), params, x, fisher='empirical', examples=N, approximation=approximation
  )
  tx = link(curvature, damping=1e-2)
  state = tx.init(params)
  extra = {} if link is kron.scale_by_kfac else {'basis': kron.basis(state, curvature)}
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, **extra)
  updates, _ = jax.jit(tx.update)(grads, state, stats=stats)
  ((w, b, out),) = single_gradients(network, params, x, n)
  rows, g = np.concatenate([w, b[:, None]], 1), np.concatenate([grads[0], grads[1][None]])
  for j in range(3):
    f = np.einsum('ni,nk->ik', rows[..., j], rows[..., j]) / N
    f = np.diag(np.diag(f)) if approximation == 'diagonal' else f
    expected = np.linalg.solve(f + 1e-2 * np.eye(5), g[:, j])
    close(np.concatenate([updates[0][:, j], updates[1][j : j + 1]]), expected, 1e-9)
  assert out.shape[0] == N


def test_a_chain_learns_and_choices_mix():
  network, params, x, n, _ = make('dense')
  loss = loss_of(network, n)
  choices = {'0': 'unit', '2': 'diagonal'}
  curvature = kron.curvature(loss, params, x, fisher='empirical', examples=N, approximation=choices)
  assert [b.operator.name for b in curvature.blocks] == ['dense', 'dense']
  tx = kron.kfac(0.1, curvature, damping=1e-2)
  state, first = tx.init(params), float(loss(params, x))
  gradients = jax.jit(curvature.value_and_grad)
  for _ in range(20):
    _, grads, stats = gradients(params, x)
    updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
    params = optax.apply_updates(params, updates)
  assert float(loss(params, x)) < 0.5 * first


def test_too_large_a_unit_becomes_diagonal_and_wrong_choices_are_refused():
  network, params, x, n, _ = make('dense')
  curvature = kron.curvature(
    loss_of(network, n), params, x, fisher='empirical', examples=N, approximation='unit', max_factor=3
  )
  assert 'dense (diagonal)' in str(curvature) and 'dense (unit-wise)' in str(curvature)
  with pytest.raises(kron.CurvatureError, match="approximation 'full' for"):
    kron.curvature(loss_of(network, n), params, x, fisher='empirical', examples=N, approximation='full')
  with pytest.raises(kron.CurvatureError, match='complex'):
    waves = lambda p, x: squared(jnp.abs((x + 1j) @ p['w']))  # noqa: E731
    own = {'w': params[0]}
    settings = {'fisher': 'empirical', 'examples': N, 'approximation': 'unit'}
    kron.curvature(waves, own, x, **settings).value_and_grad(own, x)
