"""One parameter in several places: expand and reduce, tied and transposed uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.gallery import N, cross_entropy, squared, tokens
from tests.kron.reference import close
from tests.kron.unrolled import check

KEY = jax.random.key(0)


def sequence(p, x):
  return jnp.tanh(x @ p['w'] + p['b']).mean(1) @ p['out']


def over_time(p, x):
  step = lambda h, x: (jnp.tanh(x @ p['w'] + p['b'] + 0.5 * h), None)  # noqa: E731
  return jax.lax.scan(step, jnp.zeros((N, 3)), x.swapaxes(0, 1))[0] @ p['out']


def branches(p, x):
  return sum(jnp.tanh(x[:, t] @ p['w'] + p['b']) * (t + 1) for t in range(5)) @ p['out']


def image(p, x):
  x = jax.lax.conv_general_dilated(
    x.reshape(N, 2, 2, -1), p['w'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return jnp.tanh(x + p['b']).reshape(N, -1) @ p['out']


SHARED = {'w': (4, 3), 'b': (3,), 'out': (3, 2)}
NETWORKS = {
  'a sequence': (sequence, SHARED, (5, 4)),
  'a scan over time': (over_time, SHARED, (5, 4)),
  'branches': (branches, SHARED, (5, 4)),
  'a convolution': (image, {'w': (2, 2, 3, 3), 'b': (3,), 'out': (12, 2)}, (12,)),
}


@pytest.mark.brief('branches')
@pytest.mark.parametrize('name', NETWORKS)
def test_reduce_sums_over_the_uses_of_each_example(name):
  """A and G from each example's mean input and summed gradient (Eschenhagen et al. 2023, eq. 17), had from copies.

  The gradient with respect to an example's own copy of the bias is its summed g; the copy's offset of a linear layer gives
  the mean input by the kernel's gradient under a constant g.
  """
  network, shapes, x_shape = NETWORKS[name]
  params, x = normals(shapes), normal(N, *x_shape)
  loss = lambda p, x: squared(network(p, x))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='empirical', sharing={'w': 'reduce'})
  assert 'reduce' in str(curvature)
  stats = jax.jit(curvature.value_and_grad)(params, x)[2]
  alone = lambda i: jax.grad(lambda p: squared(network_of_one(network, p, x[i : i + 1])))(params)  # noqa: E731

  def network_of_one(network, p, x):
    return network(p, jnp.concatenate([x, jnp.zeros((N - 1, *x.shape[1:]))]))[:1]

  g = np.stack([np.asarray(alone(i)['b'], np.float64) for i in range(N)])
  close(stats.sums['w']['G'][0], g.T @ g, 1e-4)
  assert stats.uses['w']['A'] == N
  if name != 'a convolution':
    a = np.concatenate([np.asarray(x, np.float64).mean(1), np.ones((N, 1))], 1)
  else:
    ones = jnp.zeros_like(params['w'])
    linear = lambda w, x: jax.lax.conv_general_dilated(  # noqa: E731
      x.reshape(1, 2, 2, -1), w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )[..., 0].mean()
    rows = np.stack([np.asarray(jax.grad(linear)(ones, x[i]))[..., 0].reshape(-1) for i in range(N)])
    a = np.concatenate([rows, np.ones((N, 1))], 1)
  close(stats.sums['w']['A'][0], a.T @ a, 1e-4)


def test_reduce_of_microbatches_adds_up():
  params, x = normals(SHARED), normal(8, 5, 4)
  loss = lambda p, x: squared(sequence(p, x))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='empirical', sharing='reduce')
  whole = jax.jit(curvature.value_and_grad)(params, x)[2]
  parts = kron.accumulate(*(jax.jit(curvature.value_and_grad)(params, part)[2] for part in jnp.split(x, 2)))
  jax.tree.map(lambda a, b: close(a, b, 1e-5), parts, whole)


def test_expand_and_reduce_agree_where_nothing_is_shared():
  params, x = normals({'w': (4, 3), 'b': (3,), 'out': (3, 2)}), normal(N, 4)
  loss = lambda p, x: squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out'])  # noqa: E731
  results = [
    kron.curvature(loss, params, x, fisher='exact', sharing=sharing).value_and_grad(params, x)[2]
    for sharing in kron.SHARING
  ]
  jax.tree.map(lambda a, b: close(a, b, 1e-5), *results)


def test_reduce_is_refused_where_it_means_nothing():
  params = {'embedding': normal(11, 4)}
  loss = lambda p, x: cross_entropy(p['embedding'][x] @ p['embedding'].T, x)  # noqa: E731
  steps = lambda p, x: jax.lax.scan(lambda s, x: (s + squared(x @ p['w']), None), 0.0, x)[0]  # noqa: E731
  with pytest.raises(kron.CurvatureError, match='observed inside of a loop'):
    kron.curvature(steps, {'w': normal(4, 2)}, normal(3, N, 4), fisher='exact', sharing='reduce')
  with pytest.raises(kron.CurvatureError, match="supports only 'expand'"):
    kron.curvature(loss, params, tokens(), fisher='exact', sharing={'embedding': 'reduce'})
  with pytest.raises(kron.CurvatureError, match=r'sharing .* matches no parameter'):
    kron.curvature(loss, params, tokens(), fisher='exact', sharing={'nothing': 'reduce'})
  with pytest.raises(kron.CurvatureError, match=r"sharing 'both' .* is unknown"):
    kron.curvature(loss, params, tokens(), fisher='exact', sharing='both')


@pytest.mark.long
def test_a_tied_embedding_keeps_a_diagonal_for_its_vocabulary():
  params = normals({'embedding': (11, 4), 'mix': (4, 4)})
  x = tokens()
  loss = lambda p, x: cross_entropy(jnp.tanh(p['embedding'][x] @ p['mix']) @ p['embedding'].T, x)  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='empirical')
  assert 'A diagonal of 11, G 4x4' in str(curvature) and 'also transposed' in str(curvature)
  assert check(curvature, loss, params, (x,), N) == 2
  stats = jax.jit(curvature.value_and_grad)(params, x)[2]
  close(stats.sums['embedding']['A'].reshape(-1), np.bincount(np.asarray(x).reshape(-1), minlength=11), 1e-6)


def test_two_uses_combine_to_the_product_with_the_same_partial_traces():
  """F = A x G + G' x A' has partial traces that the two factors' product keeps."""
  params = normals({'w': (3, 4), 'out': (3, 2)})
  x = normal(N, 3)
  loss = lambda p, x: squared(jnp.tanh(x @ p['w']) @ p['w'].T @ p['out'])  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='exact')
  stats = jax.jit(curvature.value_and_grad)(params, x)[2]
  block = next(b for b in curvature.blocks if b.name == 'w')
  means = {k: np.asarray(v, np.float64) for k, v in stats.means('w').items()}
  full = np.kron(means['A'][0], means['G'][0]) + np.kron(means["G'"][0], means["A'"][0])
  factors = block.operator.combine({k: jnp.asarray(v) for k, v in means.items()})
  product = np.kron(factors['A'][0], factors['G'][0]).reshape(3, 4, 3, 4)
  close(np.einsum('iojo->ij', product), np.einsum('iojo->ij', full.reshape(3, 4, 3, 4)), 1e-5)
  close(np.einsum('ioip->op', product), np.einsum('ioip->op', full.reshape(3, 4, 3, 4)), 1e-5)


@pytest.mark.long
@pytest.mark.parametrize('oversize', ['diagonal', 'blocks'])
def test_factors_above_the_chosen_size(oversize):
  """Large factors are the diagonal, or the diagonal blocks, of the whole ones; the update solves with them."""
  params = normals({'w': (5, 3), 'b': (3,), 'out': (3, 7)})
  x = normal(8, 5)
  loss = lambda p, x: squared(jnp.tanh(x @ p['w'] + p['b']) @ p['out'])  # noqa: E731
  whole = kron.curvature(loss, params, x, fisher='exact')
  part = kron.curvature(loss, params, x, fisher='exact', max_factor=3, oversize=oversize)
  full, found = jax.jit(whole.value_and_grad)(params, x)[2], jax.jit(part.value_and_grad)(params, x)[2]
  a, g = np.asarray(full.sums['w']['A'][0])[:5, :5], np.asarray(full.sums['out']['G'][0])
  text = str(part)
  if oversize == 'diagonal':
    assert 'A diagonal of 5' in text and 'G diagonal of 7' in text and 'G 3x3' in text
    close(found.sums['w']['A'].reshape(-1), np.diag(a), 1e-5)
    close(found.sums['out']['G'].reshape(-1), np.diag(g), 1e-5)
    dense_a = np.diag(np.diag(a))
  else:
    assert 'A 2 blocks of 3x3' in text and 'G 3 blocks of 3x3' in text
    dense_a = np.zeros((5, 5))
    for k in (0, 3):
      dense_a[k : k + 3, k : k + 3] = a[k : k + 3, k : k + 3]
      padded = np.zeros((3, 3))
      padded[: min(3, 5 - k), : min(3, 5 - k)] = a[k : k + 3, k : k + 3]
      close(found.sums['w']['A'][k // 3], padded, 1e-5)
  _, grads, stats = jax.jit(part.value_and_grad)(params, x)
  tx = kron.scale_by_kfac(part, damping=0.01)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  a_mean, g_mean = dense_a / 8, np.asarray(full.sums['w']['G'][0]) / 8
  size = 5 if oversize == 'diagonal' else 6  # padding counts in the mean diagonal
  pi = np.sqrt(np.trace(a_mean) / size / (np.trace(g_mean) / 3))
  solved = np.linalg.solve(a_mean + pi * 0.1 * np.eye(5), np.asarray(grads['w'])) @ np.linalg.inv(
    g_mean + 0.1 / pi * np.eye(3)
  )
  close(updates['w'], solved, 1e-4)
