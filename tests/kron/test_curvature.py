"""What defines curvature: marks, losses of one's own, masks and counts; and what does not: terms of parameters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.gallery import N, cross_entropy, squared, tokens
from tests.kron.reference import close, exact_fisher

KEY = jax.random.key(0)


def network(p, x):
  return jnp.tanh(x @ p['w'] + p['b']) @ p['out']


SHAPES = {'w': (4, 3), 'b': (3,), 'out': (3, 2)}


def block(stats, name):
  return np.kron(stats.means(name)['A'][0], stats.means(name)['G'][0])


def huber(z, y):
  return optax.huber_loss(z, y, delta=0.5).sum()


def softmax_loss(z, y):
  return jax.nn.logsumexp(z) - (z * y).sum()


LOSSES = {
  'softmax': (softmax_loss, lambda z, y: kron.observe.categorical(z), lambda n: jax.nn.one_hot(jnp.arange(n) % 2, 2)),
  'squared': (lambda z, y: 0.5 * ((z - y) ** 2).sum(), lambda z, y: kron.observe.gaussian(z), lambda n: jnp.ones((n, 2))),
  'logistic': (
    lambda z, y: (jnp.logaddexp(0.0, z) - y * z).sum(), lambda z, y: kron.observe.bernoulli(z), lambda n: jnp.ones((n, 2)),
  ),
}  # fmt: skip


@pytest.mark.brief('squared-sampled', 'logistic-exact', 'softmax-sampled')
@pytest.mark.parametrize('fisher', ['exact', 'sampled'])
@pytest.mark.parametrize('name', LOSSES)
def test_the_hessian_of_a_loss_is_its_likelihoods_fisher(name, fisher):
  fn, observe, targets = LOSSES[name]
  n = 7 if fisher == 'exact' else 20_000
  params = normals(SHAPES)
  x = normal(7, 4) if fisher == 'exact' else jnp.tile(normal(1, 4), (n, 1))
  y = targets(n)
  results = []
  for mark in (lambda z, y: kron.observe.loss(z, fn, y), observe):
    loss = lambda p, x, y, mark=mark: jax.vmap(fn)(mark(network(p, x), y), y).mean()  # noqa: E731
    results.append(jax.jit(kron.curvature(loss, params, x, y, fisher=fisher).value_and_grad)(params, x, y, key=KEY)[2])
  tolerance = 1e-4 if fisher == 'exact' else 0.05
  for name in ('w', 'out'):
    close(results[0].sums[name]['G'], results[1].sums[name]['G'], tolerance)


def test_the_ggn_of_a_loss_whose_hessian_depends_on_the_target():
  """J^T H J of one example, where the factorisation is exact."""
  params, x, y = normals(SHAPES), normal(1, 4), jnp.array([[0.1, 3.0]])
  loss = lambda p, x, y: jax.vmap(huber)(kron.observe.loss(network(p, x), huber, y), y).mean()  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, x, y, fisher='exact').value_and_grad)(params, x, y)[2]
  root = lambda z: jnp.diag((jnp.abs(z - y[0]) < 0.5).astype(z.dtype))  # noqa: E731
  only = lambda own, x: network({**params, 'out': own}, x)  # noqa: E731
  close(block(stats, 'out'), exact_fisher(only, params['out'], x, root), 1e-5)


def test_complex_outputs():
  """|z|^2 / 2 of a complex z: the GGN of its real and imaginary parts."""
  params, x = normals({'w': (4, 3)}), normal(1, 4)
  turn = jnp.exp(1j * jnp.arange(3))

  def z(p, x):
    y = x @ p['w']
    return y * turn + 1j * jnp.sin(y)

  loss = lambda p, x: 0.5 * (jnp.abs(kron.observe.gaussian(z(p, x))) ** 2).sum(-1).mean()  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, x, fisher='exact').value_and_grad)(params, x)[2]
  parts = lambda own, x: jnp.concatenate([z({'w': own}, x).real, z({'w': own}, x).imag], -1)  # noqa: E731
  expected = exact_fisher(parts, params['w'], x, lambda z: jnp.eye(6))
  close(block(stats, 'w'), expected, 1e-5)


def test_complex_activations_count_as_two_real_ones():
  """A real kernel under complex data: dw = Re(x dy), so the real and imaginary parts of x are two uses."""
  params, x = normals({'w': (4, 3)}), normal(N, 4) + 1j * normal(N, 4, seed=3)
  loss = lambda p, x: 0.5 * (jnp.abs(kron.observe.gaussian(x @ p['w'])) ** 2).sum(-1).mean()  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  both = jnp.concatenate([x.real, x.imag])
  close(stats.sums['w']['A'][0], both.T @ both, 1e-5)
  assert stats.uses['w']['A'] == 2 * N


def language_model(p, x, mask=None):
  h = jnp.tanh(p['embedding'][x] @ p['w'])
  logits = kron.observe.categorical(h @ p['head'], x, mask=mask)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, x)
  return (nll * mask).sum() / mask.sum() if mask is not None else nll.mean()


LANGUAGE = {'embedding': (11, 4), 'w': (4, 4), 'head': (4, 11)}


@pytest.mark.long
def test_examples_are_counted_per_token_or_per_sequence_as_the_mark_says():
  """A mark's leading axes count: tokens where the logits are (sequence, token, class); a sequence is one observation where
  the event takes both axes in. Sums are the same, so G per sequence is G per token times the length."""
  params, x = normals(LANGUAGE), tokens()
  per_token = jax.jit(kron.curvature(language_model, params, x, fisher='exact').value_and_grad)(params, x)[2]

  def per_sequence(p, x):
    h = jnp.tanh(p['embedding'][x] @ p['w'])
    logits = kron.observe.loss(h @ p['head'], lambda z: jax.nn.logsumexp(z, -1).sum(), event_ndims=2)
    return optax.softmax_cross_entropy_with_integer_labels(logits, x).sum(-1).mean()

  whole = jax.jit(kron.curvature(per_sequence, params, x, fisher='exact').value_and_grad)(params, x)[2]
  assert per_token.examples == N * 5 and whole.examples == N
  close(whole.sums['w']['G'], per_token.sums['w']['G'], 1e-4)
  close(whole.means('w')['G'], 5 * per_token.means('w')['G'], 1e-4)
  close(whole.means('w')['A'], per_token.means('w')['A'], 1e-5)


def test_padding_counts_for_nothing_but_in_the_input_factor():
  """G is that of the tokens that count; A averages over every position that the program computes."""
  params, x = normals(LANGUAGE), tokens()
  mask = (jnp.arange(5) < 3) & jnp.ones((N, 1), bool)
  stats = jax.jit(kron.curvature(language_model, params, x, mask, fisher='exact').value_and_grad)(params, x, mask)[2]
  short = jax.jit(kron.curvature(language_model, params, x[:, :3], fisher='exact').value_and_grad)(params, x[:, :3])[2]
  assert stats.examples == N * 3
  for name in ('w', 'head'):
    close(stats.sums[name]['G'], short.sums[name]['G'], 1e-4)
  assert stats.uses['w']['A'] == N * 5 and short.uses['w']['A'] == N * 3


def test_two_observed_outputs_add_up():
  params, x = normals({'w': (4, 3), 'a': (3, 2), 'c': (3, 5)}), normal(N, 4)

  def loss(p, x, first=1.0, second=1.0):
    h = jnp.tanh(x @ p['w'])
    z, logits = h @ p['a'], h @ p['c']
    z = kron.observe.gaussian(z) if first else z
    logits = kron.observe.categorical(logits) if second else logits
    return (z**2).sum(-1).mean() - jax.nn.log_softmax(logits)[:, 0].mean()

  both = jax.jit(kron.curvature(loss, params, x, fisher='exact').value_and_grad)(params, x)[2]
  parts = []
  for marks in ((1, 0), (0, 1)):
    one = kron.curvature(lambda p, x, m=marks: loss(p, x, *m), params, x, fisher='exact', fallback={'[ac]': 'gradient'})
    parts.append(jax.jit(one.value_and_grad)(params, x)[2])
  close(both.sums['w']['G'], parts[0].sums['w']['G'] + parts[1].sums['w']['G'], 1e-5)
  with pytest.raises(kron.CurvatureError, match="'c' reaches the loss but no observed output"):
    kron.curvature(lambda p, x: loss(p, x, 1, 0), params, x, fisher='exact')


OWN_TERMS = {
  'weight decay': lambda p, old, rate: 0.1 * sum((v**2).sum() for v in jax.tree.leaves(p)),
  'a rate that is an argument': lambda p, old, rate: rate * sum(jnp.abs(v).sum() for v in jax.tree.leaves(p)),
  'group lasso': lambda p, old, rate: jnp.sqrt((p['w'] ** 2).sum(0) + 1e-6).sum(),
  'orthogonality': lambda p, old, rate: ((p['w'].T @ p['w'] - jnp.eye(3)) ** 2).sum(),
  'elastic weights': lambda p, old, rate: (old['w'] ** 2 * (p['w'] - old['w']) ** 2).sum(),
  'log determinant': lambda p, old, rate: jnp.linalg.slogdet(p['w'].T @ p['w'])[1],
  'a loop over layers': lambda p, old, rate: jax.lax.fori_loop(0, 3, lambda i, s: s + (p['w'] ** i).sum(), 0.0),
}


@pytest.mark.long('weight decay', 'a rate that is an argument', 'group lasso', 'log determinant', 'orthogonality')
@pytest.mark.parametrize('name', OWN_TERMS)
def test_terms_of_parameters_alone_change_the_gradient_and_not_the_curvature(name):
  params, x = normals(SHAPES), normal(N, 4)
  old, rate = jax.tree.map(jnp.ones_like, params), jnp.float32(0.3)
  plainly = lambda p, x, old, rate: squared(network(p, x))  # noqa: E731
  loss = lambda p, x, old, rate: plainly(p, x, old, rate) + OWN_TERMS[name](p, old, rate)  # noqa: E731
  curvature = kron.curvature(loss, params, x, old, rate, fisher='exact')
  assert not curvature.gradient_only
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x, old, rate)
  expected = jax.jit(kron.curvature(plainly, params, x, old, rate, fisher='exact').value_and_grad)(
    params, x, old, rate
  )[2]
  jax.tree.map(lambda a, b: close(a, b, 1e-5), stats, expected)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, jax.grad(loss)(params, x, old, rate))
  if name == 'weight decay':
    assert 'with terms of their own in the loss: b, out, w' in str(curvature)


def test_what_is_frozen_is_listed_and_has_no_block():
  params, x = normals(SHAPES), normal(N, 4)
  loss = lambda p, x: squared(network({**p, 'w': jax.lax.stop_gradient(p['w'])}, x))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='exact')
  assert curvature.gradient_only == {'w': 'it has no gradient'}
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  assert not np.any(grads['w']) and set(stats.sums) == {'b', 'out'}
  tx = kron.kfac(0.1, curvature)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  assert not np.any(updates['w']) and np.any(updates['out'])


def test_masked_and_partitioned_parameters():
  """Part of the parameters by K-FAC, the others by another optimiser or not at all."""
  params, x = normals(SHAPES), normal(N, 4)
  loss = lambda p, x: squared(network(p, x))  # noqa: E731
  curvature = kron.curvature(loss, params, x, fisher='exact')
  _, grads, stats = jax.jit(curvature.value_and_grad)(params, x)
  alone = kron.scale_by_kfac(curvature)
  expected, _ = jax.jit(alone.update)(grads, alone.init(params), params, stats=stats)
  masked = optax.masked(kron.scale_by_kfac(curvature), {'w': True, 'b': True, 'out': False})
  updates, _ = jax.jit(masked.update)(grads, masked.init(params), params, stats=stats)
  close(updates['w'], expected['w'], 1e-6)
  close(updates['out'], grads['out'], 1e-6)
  labels = {'w': 'second', 'b': 'second', 'out': 'first'}
  split = optax.partition({'second': kron.scale_by_kfac(curvature), 'first': optax.adam(1.0)}, labels)
  updates, _ = jax.jit(split.update)(grads, split.init(params), params, stats=stats)
  close(updates['b'], expected['b'], 1e-6)


def test_dropout_and_auxiliary_outputs():
  """The masks are the same with and without probes; what the loss returns besides comes back."""
  params, x = normals(SHAPES), normal(N, 4)

  def loss(p, x, key):
    keep = jax.random.bernoulli(key, 0.5, (N, 3))
    h = jnp.where(keep, jnp.tanh(x @ p['w'] + p['b']) / 0.5, 0)
    z = kron.observe.gaussian(h @ p['out'])
    return 0.5 * (z**2).sum(-1).mean(), {'hidden': h, 'norm': optax.global_norm(p), 'name': None}

  curvature = kron.curvature(loss, params, x, KEY, has_aux=True)
  (value, aux), grads, stats = jax.jit(curvature.value_and_grad)(params, x, KEY)
  (expected, expected_aux), expected_grads = jax.value_and_grad(loss, has_aux=True)(params, x, KEY)
  close(value, expected, 1e-6)
  jax.tree.map(lambda a, b: close(a, b, 1e-6), (aux, grads), (expected_aux, expected_grads))
  h = np.asarray(aux['hidden'])
  close(stats.sums['out']['A'][0], h.T @ h, 1e-5)


def test_accumulation_inside_of_the_loss_is_one_large_batch():
  """A scan over microbatches, each with its mark: statistics are those of the whole batch."""
  params, x = normals(SHAPES), normal(12, 4)
  loss = lambda p, x: squared(network(p, x))  # noqa: E731

  def in_parts(p, x):
    step = lambda total, part: (total + loss(p, part) / 3, None)  # noqa: E731
    return jax.lax.scan(step, 0.0, x.reshape(3, 4, 4))[0]

  for fisher in ('exact', 'empirical'):
    whole = kron.curvature(loss, params, x, fisher=fisher).value_and_grad(params, x)
    parts = kron.curvature(in_parts, params, x, fisher=fisher).value_and_grad(params, x)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), whole, parts)


def test_float64(x64):
  params = jax.tree.map(lambda s: s.astype(jnp.float64), normals(SHAPES))
  x = normal(1, 4).astype(jnp.float64)
  loss = lambda p, x: cross_entropy(network(p, x), jnp.zeros(1, jnp.int32))  # noqa: E731
  stats = jax.jit(kron.curvature(loss, params, x, fisher='exact').value_and_grad)(params, x)[2]
  p = lambda z: jax.nn.softmax(z)  # noqa: E731
  root = lambda z: jnp.sqrt(p(z))[:, None] * (jnp.eye(2) - p(z)[None])  # noqa: E731
  only = lambda own, x: network({**params, 'out': own}, x)  # noqa: E731
  assert stats.sums['out']['G'].dtype == jnp.float64
  close(block(stats, 'out'), exact_fisher(only, params['out'], x, root), 1e-10)


def test_parameters_of_other_types_are_refused():
  for value, words in ((jnp.ones((4, 2), jnp.complex64), 'complex64'), (jnp.ones((4, 2), jnp.int32), 'int32')):
    with pytest.raises(kron.CurvatureError, match=f"'w' has type {words}"):
      kron.curvature(lambda p, x: squared(jnp.abs(x @ p['w'])), {'w': value}, normal(N, 4), fisher='exact')


def test_the_table_tells_all():
  params = normals({'embedding': (11, 4), 'w': (4, 3), 'b': (3,), 'head': (3, 11)})
  loss = lambda p, x: cross_entropy(jnp.tanh(p['embedding'][x] @ p['w'] + p['b']) @ p['head'], x)  # noqa: E731
  curvature = kron.curvature(loss, params, tokens(), fisher='exact', max_factor=5)
  text = str(curvature)
  for words in (
    'embedding',
    'A diagonal of 11',
    'w + b',
    'A 5x5, G 3x3',
    'G diagonal of 11',
    'flops',
    'bytes',
    'share',
  ):
    assert words in text, text
  # 35 uses of w: 2 * 35 * (5^2 + 3^2); of head: 2 * 35 * (3^2 + 11); of the embedding: 2 * 35 * (11 + 4^2).
  assert sum(b.flops for b in curvature.blocks) == 70 * (34 + 20 + 27)
  # A: 11, 5^2, 3^2; G: 4^2, 3^2, 11; four bytes each.
  assert f'factors take {4 * (11 + 25 + 9 + 16 + 9 + 11)}B' in text


def test_an_output_observed_twice_is_refused():
  def loss(p, x):
    return squared(kron.observe.gaussian(x @ p['w']))

  with pytest.raises(kron.CurvatureError, match='observed twice'):
    kron.curvature(loss, {'w': jnp.ones((3, 2))}, jnp.ones((4, 3)))


INSIDE_THE_MEAN = {
  'weight decay': lambda p: 0.1 * (p['w'] ** 2).sum(),
  'less a term': lambda p: -jnp.abs(p['w']).sum(),
  'of two parameters': lambda p: (p['w'] ** 2).sum() * (p['out'] ** 2).sum(),
  'a determinant': lambda p: jnp.linalg.slogdet(p['w'].T @ p['w'])[1],
  'a loop': lambda p: jax.lax.fori_loop(0, 3, lambda i, s: s + (p['w'] ** i).sum(), 0.0),
}


@pytest.mark.brief(
  'less a term-empirical',
  'of two parameters-exact',
  'weight decay-empirical',
  'a determinant-empirical',
  'a loop-empirical',
)
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
@pytest.mark.parametrize('name', INSIDE_THE_MEAN)
def test_terms_added_to_the_losses_of_single_examples_are_regularisers(name, fisher):
  """As kfac-jax's convolutional test has its L2 term: before the mean over the examples."""
  params, x = normals(SHAPES), normal(N, 4)

  def loss(p, x, term):
    each = 0.5 * (kron.observe.gaussian(network(p, x)) ** 2).sum(-1)
    return (each + term(p)).mean()

  both = [lambda p, x: loss(p, x, INSIDE_THE_MEAN[name]), lambda p, x: loss(p, x, lambda p: 0.0)]
  curvatures = [kron.curvature(f, params, x, fisher=fisher) for f in both]
  assert not curvatures[0].gradient_only and 'w' in curvatures[0].regularised
  (_, grads, with_term), (_, _, without) = (jax.jit(c.value_and_grad)(params, x) for c in curvatures)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), with_term.sums, without.sums)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, jax.grad(both[0])(params, x))


def test_a_term_that_reaches_an_output_is_no_regulariser():
  """What is added to one mark's output goes into another's."""
  params, x = normals(SHAPES), normal(N, 4)

  def loss(p, x):
    z = kron.observe.gaussian(network(p, x))
    again = kron.observe.gaussian(z[:, :1] + (p['w'] ** 2).sum())
    return 0.5 * (z**2).sum(-1).mean() + 0.5 * (again**2).sum(-1).mean()

  with pytest.raises(kron.CurvatureError, match="parameter 'w' is used by add"):
    kron.curvature(loss, params, x, fisher='empirical')


def test_the_table_names_each_parameter_once():
  params = {'net': {'layer': {'b': jnp.ones(3), 'w': jnp.ones((4, 3))}}}
  x = jnp.ones((5, 4))

  def loss(params, x):
    layer = params['net']['layer']
    return 0.5 * (kron.observe.gaussian(x @ layer['w'] + layer['b']) ** 2).sum(-1).mean()

  lines = str(kron.curvature(loss, params, x)).splitlines()
  assert lines[2].split() == ['net/layer/w', '+', 'b', 'dense', 'A', '5x5,', 'G', '3x3', '136', '100.0%', '340']
