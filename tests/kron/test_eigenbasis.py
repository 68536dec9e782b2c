"""EKFAC and Adam in K-FAC's eigenbasis, against dense matrices and per-example gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from kronmesh.kron.optimizers import eigenbasis
from tests.kron.reference import close

N, D, H, K = 16, 4, 5, 3
KEYS = jax.random.split(jax.random.key(7), 8)


def dense_net(params, x):
  return jnp.tanh(x @ params['in'] + params['bias']) @ params['out']


def dense_params():
  return {
    'in': jax.random.normal(KEYS[0], (D, H)),
    'bias': jax.random.normal(KEYS[1], (H,)),
    'out': jax.random.normal(KEYS[2], (H, K)),
  }


def data():
  return jax.random.normal(KEYS[3], (N, D)), jax.random.randint(KEYS[4], (N,), 0, K)


def cross_entropy(z, y):
  return optax.softmax_cross_entropy_with_integer_labels(z, y)


def loss_of(network):
  def loss(params, x, y):
    return cross_entropy(kron.observe.categorical(network(params, x), y), y).mean()

  return loss


def some_basis(curvature):
  """Any orthogonal matrices; diagonals have the axes themselves."""
  basis, key = {}, KEYS[5]
  for b in curvature.blocks:
    if 'A' not in b.operator.factors:
      continue
    basis[b.name] = {}
    for name, f in b.operator.factors.items():
      key, own = jax.random.split(key)
      random = jax.random.normal(own, (f.rows, f.n, f.n), b.dtype)
      basis[b.name][name] = jnp.linalg.qr(random)[0] if f.n > 1 else jnp.ones_like(random)
  return basis


def moments(curvature, params, args, basis):
  stats = jax.jit(functools.partial(curvature.value_and_grad, basis=basis))(params, *args)[2]
  return {name: stats.means(name)['S'] for name in basis}


def homogeneous(kernel, bias):
  return jnp.concatenate([kernel, bias[..., None, :]], -2)


def squares_by_example(gradients, basis):
  """The mean of squares of (examples, s, i, o) in the basis: what S is where a kernel has one use in each example."""
  return jnp.mean(jnp.einsum('sji,nsjk,sko->nsio', basis['A'], gradients, basis['G']) ** 2, 0)


def test_moments_of_dense_layers():
  params, (x, y) = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, x, y, fisher='empirical')
  basis = some_basis(curvature)
  found = moments(curvature, params, (x, y), basis)
  one = lambda p, x, y: cross_entropy(dense_net(p, x[None])[0], y)  # noqa: E731
  g = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
  close(found['in'], squares_by_example(homogeneous(g['in'], g['bias'])[:, None], basis['in']), 1e-5)
  close(found['out'], squares_by_example(g['out'][:, None], basis['out']), 1e-5)


@pytest.mark.parametrize('fisher', ['exact', 'sampled'])
def test_moments_are_of_the_same_fisher_as_the_factors(fisher):
  """Their sum is the trace of the block, whatever the basis: for one use an example E[|a|^2 |g|^2]."""
  params, (x, y) = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, x, y, fisher=fisher)
  basis = some_basis(curvature)
  evaluate = jax.jit(functools.partial(curvature.value_and_grad, key=KEYS[6], basis=basis))
  # With one example the block is A x G itself.
  stats = evaluate(params, x[:1], y[:1])[2]
  for name in basis:
    means = stats.means(name)
    close(means['S'].sum(), jnp.trace(means['A'][0]) * jnp.trace(means['G'][0]), 1e-5)


def conv_net(params, x):
  h = jax.lax.conv_general_dilated(x, params['conv'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  return jnp.tanh(h).mean((1, 2)) @ params['out']


def conv_problem():
  params = {'conv': jax.random.normal(KEYS[0], (3, 3, 2, 4)), 'out': jax.random.normal(KEYS[1], (4, K))}
  return params, (jax.random.normal(KEYS[3], (N, 5, 5, 2)), data()[1])


def rows_of_conv(params, x, y):
  """Patches (n, positions, 18) and the examples' gradients at the output (n, positions, 4)."""
  patches = jax.lax.conv_general_dilated_patches(x, (3, 3), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  patches = patches.reshape(*x.shape[:3], 2, 9).swapaxes(-1, -2).reshape(N, 25, 18)

  def one(offset, x, y):
    h = jax.lax.conv_general_dilated(
      x[None], params['conv'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return cross_entropy(jnp.tanh(h[0] + offset).mean((0, 1)) @ params['out'], y)

  return patches, jax.vmap(jax.grad(one), (None, 0, 0))(jnp.zeros((5, 5, 4)), x, y).reshape(N, 25, 4)


@pytest.mark.brief('reduce')
@pytest.mark.parametrize('sharing', ['expand', 'reduce'])
def test_moments_of_a_convolution(sharing):
  params, args = conv_problem()
  curvature = kron.curvature(loss_of(conv_net), params, *args, fisher='empirical', sharing={'conv': sharing})
  basis = some_basis(curvature)
  a, g = rows_of_conv(params, *args)
  if sharing == 'reduce':
    a, g = a.mean(1, keepdims=True), g.sum(1, keepdims=True)
  uses = jnp.einsum('npi,npo->npio', a @ basis['conv']['A'][0], g @ basis['conv']['G'][0])
  close(moments(curvature, params, args, basis)['conv'][0], (uses**2).sum((0, 1)) / N, 1e-5)


@pytest.mark.long('False')
@pytest.mark.parametrize('one_hot', [False, True])
def test_moments_of_an_embedding(one_hot):
  params = {'table': jax.random.normal(KEYS[0], (7, H)), 'out': jax.random.normal(KEYS[1], (H, K))}
  tokens, y = jax.random.randint(KEYS[3], (N,), 0, 7), data()[1]

  def network(params, tokens):
    h = jax.nn.one_hot(tokens, 7) @ params['table'] if one_hot else params['table'][tokens]
    return jnp.tanh(h) @ params['out']

  curvature = kron.curvature(loss_of(network), params, tokens, y, fisher='empirical')
  assert curvature.blocks[1].operator.factors['A'].n == 1
  basis = some_basis(curvature)
  one = lambda p, t, y: cross_entropy(network(p, t[None])[0], y)  # noqa: E731
  g = jax.vmap(jax.grad(one), (None, 0, 0))(params, tokens, y)['table']
  expected = jnp.mean((g @ basis['table']['G'][0]) ** 2, 0)
  close(moments(curvature, params, (tokens, y), basis)['table'][0], expected, 1e-5)


@pytest.mark.long
def test_moments_of_layers_stacked_in_a_scan_and_of_a_tied_kernel():
  params = {'stack': jax.random.normal(KEYS[0], (3, D, D)), 'tied': jax.random.normal(KEYS[1], (D, K))}
  x, y = data()

  @jax.custom_jvp
  def double(x):
    return 2 * x

  double.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))

  def network(params, x):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(double(h) @ w / 2), None), x, params['stack'])[0]
    return jnp.tanh(h @ params['tied']) @ params['tied'].T @ params['tied']

  curvature = kron.curvature(loss_of(network), params, x, y, fisher='empirical')
  basis = some_basis(curvature)
  found = moments(curvature, params, (x, y), basis)
  one = lambda p, x, y: cross_entropy(network(p, x[None])[0], y)  # noqa: E731
  g = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
  close(found['stack'], squares_by_example(g['stack'], basis['stack']), 1e-5)

  def apart(kernels, x, y):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x[None], params['stack'])[0]
    return cross_entropy((jnp.tanh(h @ kernels[0]) @ kernels[1].T @ kernels[2])[0], y)

  uses = jax.vmap(jax.grad(apart), (None, 0, 0))([params['tied']] * 3, x, y)
  close(found['tied'], sum(squares_by_example(u[:, None], basis['tied']) for u in uses), 1e-5)


@pytest.mark.long
def test_moments_of_a_factor_in_uneven_blocks():
  params, (x, y) = dense_params(), data()
  options = {'max_factor': 3, 'oversize': 'blocks'}
  curvature = kron.curvature(loss_of(dense_net), params, x, y, fisher='empirical', **options)
  factors = curvature.blocks[-1].operator.factors
  assert factors['A'].parts == 2 and factors['A'].parts * factors['A'].n > factors['A'].size
  tx = kron.scale_by_ekfac(curvature, damping=0.1, basis_every=1)
  state = one_step(tx, curvature, params, (x, y))[1]
  for vectors in kron.basis(state, curvature)['out'].values():
    close(jnp.swapaxes(vectors, 1, 2) @ vectors, jnp.broadcast_to(jnp.eye(vectors.shape[-1]), vectors.shape), 1e-5)
  # Filling takes the last places: within the size the basis is orthogonal by itself.
  u = kron.basis(state, curvature)['out']['A'][1]
  close(u[:2, :2].T @ u[:2, :2], jnp.eye(2), 1e-5)


def one_step(tx, curvature, params, args, state=None):
  """A step with moments in the state's basis."""
  state = tx.init(params) if state is None else state
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, *args, basis=kron.basis(state, curvature))
  updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
  return grads, state, updates


def matrices(grads):
  return {'in': homogeneous(grads['in'], grads['bias']), 'out': grads['out']}


def test_ekfac_equals_its_dense_form():
  """At a refresh with the products of eigenvalues, later with what was measured."""
  params, (x, y) = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, x, y, fisher='empirical')
  tx = kron.scale_by_ekfac(curvature, damping=0.01, decay=0.0, basis_every=2)
  grads, state, updates = one_step(tx, curvature, params, (x, y))
  factors = kron.factors(state)
  for name, v in matrices(grads).items():
    dense = np.kron(factors[name]['A'][0], factors[name]['G'][0]) + 0.01 * np.eye(v.size)
    close(matrices(updates)[name].reshape(-1), np.linalg.solve(dense, v.reshape(-1)), 2e-4)
  basis = kron.basis(state, curvature)
  expected = moments(curvature, params, (x, y), basis)
  grads, state, updates = one_step(tx, curvature, params, (x, y), state)
  for name, v in matrices(grads).items():
    u = np.kron(basis[name]['A'][0], basis[name]['G'][0])
    dense = u @ np.diag(expected[name].reshape(-1)) @ u.T + 0.01 * np.eye(v.size)
    close(matrices(updates)[name].reshape(-1), np.linalg.solve(dense, v.reshape(-1)), 2e-4)


@pytest.mark.long
def test_ekfac_is_nearer_to_the_fisher_than_kfac():
  """The best diagonal in any basis is the measured one (George et al. 2018, theorem 2)."""
  params, (x, y) = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, x, y, fisher='empirical')
  tx = kron.scale_by_ekfac(curvature, decay=0.0, basis_every=2)
  _, state, _ = one_step(tx, curvature, params, (x, y))
  factors, basis = kron.factors(state), kron.basis(state, curvature)
  _, state, _ = one_step(tx, curvature, params, (x, y), state)
  one = lambda p, x, y: cross_entropy(dense_net(p, x[None])[0], y)  # noqa: E731
  g = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
  for name, rows in {'in': homogeneous(g['in'], g['bias']), 'out': g['out']}.items():
    rows = np.asarray(rows).reshape(N, -1)
    fisher = rows.T @ rows / N
    u = np.kron(basis[name]['A'][0], basis[name]['G'][0])
    s = np.asarray(state.moments[name]).reshape(-1)
    kfac = np.kron(factors[name]['A'][0], factors[name]['G'][0])
    assert np.linalg.norm(fisher - u @ np.diag(s) @ u.T) < 0.95 * np.linalg.norm(fisher - kfac), name


@pytest.mark.long
def test_ekfac_treats_scale_and_shift_as_kfac_does():
  def network(params, x):
    return (jnp.tanh(x) * params['scale'] + params['shift']) @ params['out']

  params = {'scale': jnp.ones(D), 'shift': jnp.zeros(D), 'out': jax.random.normal(KEYS[0], (D, K))}
  x, y = data()
  curvature = kron.curvature(loss_of(network), params, x, y, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  kfac = kron.scale_by_kfac(curvature, damping=0.03)
  expected = jax.jit(kfac.update)(grads, kfac.init(params), params, stats=stats)[0]
  _, _, updates = one_step(kron.scale_by_ekfac(curvature, damping=0.03), curvature, params, (x, y))
  close(updates['scale'], expected['scale'], 1e-4)
  close(updates['shift'], expected['shift'], 1e-4)


@pytest.mark.long
def test_adam_in_the_eigenbasis_equals_adam_on_rotated_gradients(x64):
  params, (x, y) = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, x, y, fisher='empirical')
  tx = kron.scale_by_kfac_adam(curvature, basis_every=100)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, y)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  basis = kron.basis(state, curvature)
  to = {n: lambda v, u=u: u['A'][0].T @ v @ u['G'][0] for n, u in basis.items()}
  adam = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8)
  plain = adam.init(matrices(params))
  for k in range(3):
    if k:
      grads = jax.tree.map(lambda g, k=k: g * jnp.cos(k + jnp.arange(g.size).reshape(g.shape)), grads)
      updates, state = jax.jit(tx.update)(grads, state, params, stats=None)
    turned = {n: to[n](v) for n, v in matrices(grads).items()}
    expected, plain = adam.update(turned, plain)
    for name, u in basis.items():
      close(matrices(updates)[name], u['A'][0] @ expected[name] @ u['G'][0].T, 1e-4)


@pytest.mark.long
def test_adam_in_the_eigenbasis_is_adam_where_there_is_no_block():
  params, (x, y) = dense_params() | {'other': jnp.arange(1.0, 4.0)}, data()

  def loss(params, x, y):
    return loss_of(dense_net)(params, x, y) + (params['other'] ** 2).sum()

  curvature = kron.curvature(loss, params, x, y, fisher='empirical')
  assert 'other' in curvature.gradient_only
  tx, adam = kron.scale_by_kfac_adam(curvature), optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8)
  state, plain = tx.init(params), adam.init(params)
  for _ in range(3):
    _, grads, stats = curvature.value_and_grad(params, x, y)
    updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
    expected, plain = jax.jit(adam.update)(grads, plain)
    close(updates['other'], expected['other'], 1e-5)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))


def test_only_entries_that_are_in_no_block_have_an_average_of_their_own():
  params, (x, y) = dense_params() | {'other': jnp.arange(1.0, 4.0), 'half': jnp.ones((2 * D, 3))}, data()

  def loss(params, x, y):
    z = dense_net(params, x) + x @ params['half'][:D]
    return cross_entropy(kron.observe.categorical(z), y).mean() + (params['other'] ** 2).sum()

  curvature = kron.curvature(loss, params, x, y)
  assert set(kron.scale_by_kfac_adam(curvature).init(params).rest) == {'other', 'half'}


LINKS = {
  'ekfac': lambda curvature, **k: kron.ekfac(0.1, curvature, damping=0.01, **k),
  'kfac_adam': lambda curvature, **k: kron.kfac_adam(0.03, curvature, **k),
}


@pytest.mark.long('ekfac')
@pytest.mark.parametrize('name', LINKS)
def test_an_ordinary_optax_optimiser(name):
  """Trains inside of one jitted scan; its state keeps its types; the loss falls."""
  params, args = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, *args, fisher='exact')
  tx = LINKS[name](curvature, basis_every=3)

  def body(carry, _):
    params, state = carry
    basis = kron.basis(state, curvature)
    value, grads, stats = curvature.value_and_grad(params, *args, basis=basis if name == 'ekfac' else None)
    updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
    return (optax.apply_updates(params, updates), state), value

  (_, state), values = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, 12))(params)
  assert values[-1] < 0.7 * values[0]
  assert kron.find_state(state, kron.Eigenbasis).rejected_inverses == 0


@pytest.mark.long
@pytest.mark.parametrize('name', LINKS)
def test_any_number_of_owners_gives_the_same_update_and_checkpoint(name):
  params, args = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, *args, fisher='exact')
  results = []
  for owners in (1, 3):
    placement = kron.Local(owners)
    tx = LINKS[name](curvature, placement=placement)
    _, state, updates = one_step(tx, curvature, params, args)
    logical = kron.to_logical(state)
    back = kron.to_logical(kron.from_logical(logical, state))
    jax.tree.map(np.testing.assert_array_equal, back, logical)
    results.append((updates, logical))
  jax.tree.map(lambda a, b: close(a, b, 1e-5), *results)


def test_mistakes_end_in_one_line():
  params, args = dense_params(), data()
  curvature = kron.curvature(loss_of(dense_net), params, *args, fisher='exact')
  tx = kron.ekfac(0.1, curvature)
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, *args)
  with pytest.raises(kron.CurvatureError, match=r'basis=kron\.basis'):
    jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  with pytest.raises(kron.CurvatureError, match='holds 0 of Eigenbasis'):
    kron.basis(kron.kfac(0.1, curvature).init(params), curvature)


def test_the_eigenvectors_of_padding_come_last():
  """A stack of a whole factor and of one with fewer rows, whose padding is zero."""
  x = jax.random.normal(KEYS[6], (1, 2, 4, 4))
  x = x @ jnp.swapaxes(x, -1, -2)
  x = x.at[0, 1, 3:].set(0).at[0, 1, :, 3:].set(0)
  extended = eigenbasis._beyond_the_end({'stack': x}, {'stack': np.array([[4, 3]])})['stack']
  close(extended[0, 0], x[0, 0], 1e-6)
  vectors = jnp.linalg.eigh(extended)[1][0, 1]
  close(jnp.abs(vectors[3]), jnp.eye(4)[3], 1e-6)
  close(jnp.abs(jnp.linalg.eigh(x[0, 1, :3, :3])[1]), jnp.abs(vectors[:3, :3]), 1e-4)
  assert eigenbasis._beyond_the_end({'whole': x}, {'whole': np.array([[4, 4]])})['whole'] is x
