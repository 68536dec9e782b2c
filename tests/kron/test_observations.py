"""Marks of several sizes, weights and masks: each counts for itself, by equality with Hessians and single gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal, normals
from tests.kron.reference import close

SHAPES = {'a': (4, 2), 'b': (4, 2), 'shared': (4, 4)}
HALF = lambda z: 0.5 * (z**2).sum(-1)  # noqa: E731


def statistics(loss, params, *args, fisher='exact', **settings):
  curvature = kron.curvature(loss, params, *args, fisher=fisher, **settings)
  return jax.jit(curvature.value_and_grad)(params, *args)[2]


def block(stats, name):
  """The curvature of a kernel's block, exact where its layer is the last."""
  means = stats.means(name)
  return np.kron(means['A'][0], means['G'][0])


def hessian(loss, params, name, *args):
  size = params[name].size
  return jax.hessian(lambda w: loss({**params, name: w}, *args))(params[name]).reshape(size, size)


def two_terms(sizes, weights=(1.0, 1.0), masks=(None, None)):
  """Terms with heads of their own over batches of their own, each the mean over its observations."""

  def mean(z, mask):
    return HALF(z).mean() if mask is None else (HALF(z) * mask).sum() / mask.sum()

  def loss(p, xa, xb):
    za = kron.observe.gaussian(xa @ p['a'], mask=masks[0], weight=weights[0])
    zb = kron.observe.gaussian(xb @ p['b'], mask=masks[1], weight=weights[1])
    return weights[0] * mean(za, masks[0]) + weights[1] * mean(zb, masks[1])

  return loss, normal(sizes[0], 4), normal(sizes[1], 4, seed=5)


TERMS = {
  'of one size': {'sizes': (6, 6)},
  'of two sizes': {'sizes': (16, 4)},
  'the smaller one first': {'sizes': (3, 12)},
  'of sizes that do not divide': {'sizes': (7, 5)},
  'weighted': {'sizes': (16, 4), 'weights': (0.5, 3.0)},
  'one masked': {'sizes': (8, 8), 'masks': (jnp.arange(8) < 3, None)},
  'both masked': {'sizes': (8, 5), 'masks': (jnp.arange(8) < 3, jnp.arange(5) > 0)},
  'masked and weighted': {'sizes': (8, 5), 'weights': (2.0, 0.1), 'masks': (jnp.arange(8) < 3, None)},
}


@pytest.mark.brief('weighted')
@pytest.mark.parametrize('name', TERMS)
def test_each_term_has_its_own_curvature(name):
  """Both factors of a head: the Hessian of the loss, whose block they are exactly."""
  params = normals({k: SHAPES[k] for k in 'ab'})
  loss, *xs = two_terms(**TERMS[name])
  stats = statistics(loss, params, *xs)
  masks = TERMS[name].get('masks', (None, None))
  for head, x, mask in zip('ab', xs, masks, strict=True):
    # A is the mean over all rows that the head computes; the Hessian's over those that count.
    kept = x if mask is None else x[np.asarray(mask)]
    own = np.asarray(hessian(loss, params, head, *xs))
    weight = TERMS[name].get('weights', (1.0, 1.0))['ab'.index(head)]
    close(own, np.kron(kept.T @ kept / len(kept), weight * np.eye(2)), 1e-5)
    close(stats.means(head)['G'][0], weight * np.eye(2), 1e-5)
    close(stats.means(head)['A'][0], x.T @ x / len(x), 1e-5)


@pytest.mark.parametrize('name', TERMS)
def test_the_empirical_fisher_of_terms_of_several_sizes(name):
  """1/n sum of the outer products of each observation's own gradient, for each term with its own n."""
  params = normals({k: SHAPES[k] for k in 'ab'})
  loss, *xs = two_terms(**TERMS[name])
  stats = statistics(loss, params, *xs, fisher='empirical')
  for i, (head, x) in enumerate(zip('ab', xs, strict=True)):
    mask = TERMS[name].get('masks', (None, None))[i]
    g = TERMS[name].get('weights', (1.0, 1.0))[i] * (x @ params[head])
    kept = g if mask is None else g[np.asarray(mask)]
    close(stats.means(head)['G'][0], kept.T @ kept / len(kept), 1e-5)


def pinn(p, interior, boundary):
  """One network at points of two kinds."""
  net = lambda x: jnp.tanh(x @ p['shared']) @ p['a']  # noqa: E731
  inside = kron.observe.gaussian(net(interior))
  edge = kron.observe.gaussian(net(boundary), weight=4.0)
  return HALF(inside).mean() + 4.0 * HALF(edge).mean()


@pytest.mark.brief('empirical')
@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_a_network_shared_by_terms_of_two_sizes(fisher):
  params = normals({k: SHAPES[k] for k in ('a', 'shared')})
  interior, boundary = normal(10, 4), normal(3, 4, seed=2)
  stats = statistics(pinn, params, interior, boundary, fisher=fisher)
  terms = []
  for x, weight in ((interior, 1.0), (boundary, 4.0)):
    h = jnp.tanh(x @ params['shared'])
    slope = lambda c, h=h: (c @ params['a'].T) * (1 - h**2)  # noqa: E731
    columns = [slope(jnp.tile(jnp.eye(2)[k], (len(x), 1))) for k in range(2)]
    own = [weight * slope(h @ params['a'])]
    terms.append(sum(g.T @ g for g in (own if fisher == 'empirical' else columns)) / len(x))
    terms[-1] = terms[-1] * (1.0 if fisher == 'empirical' else weight)
  close(stats.means('shared')['G'][0], sum(terms), 1e-5)
  rows = np.concatenate([interior, boundary])
  close(stats.means('shared')['A'][0], rows.T @ rows / 13, 1e-5)


def test_three_marks_and_microbatches():
  """Statistics of microbatches of equal shape add up to those of the batch, whatever the marks' sizes are."""
  params = normals(SHAPES)

  def loss(p, x, y, z):
    terms = [kron.observe.gaussian(v @ p['shared'] @ p[k]) for v, k in ((x, 'a'), (y, 'b'), (z, 'a'))]
    return sum(HALF(t).mean() for t in terms)

  xs = normal(12, 4), normal(4, 4, seed=1), normal(8, 4, seed=2)
  halves = [[x[: len(x) // 2] for x in xs], [x[len(x) // 2 :] for x in xs]]
  for fisher in ('exact', 'empirical'):
    curvature = kron.curvature(loss, params, *xs, fisher=fisher)
    whole = jax.jit(curvature.value_and_grad)(params, *xs)[2]
    added = kron.accumulate(*(jax.jit(curvature.value_and_grad)(params, *h)[2] for h in halves))
    for name in params:
      jax.tree.map(lambda a, b: close(a, b, 1e-5), added.means(name), whole.means(name))


@pytest.mark.long
def test_products_are_those_of_the_hessian():
  """The Fisher of a network that is linear in its parameters is the Hessian of its loss."""
  params = normals({k: SHAPES[k] for k in 'ab'})
  for name in TERMS:
    loss, *xs = two_terms(**TERMS[name])
    curvature = kron.curvature(loss, params, *xs, fisher='exact')
    v = normals({k: SHAPES[k] for k in 'ab'}, seed=9)
    for fisher in ('exact', None):
      found = jax.jit(lambda v, c=curvature, xs=xs, f=fisher: c.products(params, *xs, fisher=f).fisher(v))(v)
      right = jax.jvp(jax.grad(lambda p, loss=loss, xs=xs: loss(p, *xs)), (params,), (v,))[1]
      jax.tree.map(lambda a, b: close(a, b, 1e-5), found, right)


# --- what weights and masks are


@pytest.mark.parametrize('fisher', ['exact', 'empirical'])
def test_weights_of_each_observation(fisher):
  """loss = mean(w l), as in prioritised replay."""
  params, x, t, w = normals({'a': (4, 2)}), normal(8, 4), normal(8, 2, seed=3), jnp.linspace(1.0, 9.0, 8)

  def loss(p, x, t, w):
    z = kron.observe.gaussian(x @ p['a'], t, variance=0.5, weight=w)
    return (w * ((z - t) ** 2).sum(-1)).mean()

  e = 2 * w[:, None] * (x @ params['a'] - t)
  right = 2 * jnp.eye(2) * w.mean() if fisher == 'exact' else e.T @ e / 8
  close(statistics(loss, params, x, t, w, fisher=fisher).means('a')['G'][0], right, 1e-5)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
  'mask', [jnp.ones(8), np.ones(8, np.float32), jnp.linspace(1, 9, 8), jnp.ones(8, jnp.bfloat16)]
)
@pytest.mark.parametrize('observe', [kron.observe.gaussian, kron.observe.categorical, kron.observe.bernoulli])
def test_masks_that_may_be_weights_are_refused(mask, observe):
  with pytest.raises(kron.CurvatureError, match=r'weight=w for a loss mean\(w \* l\), weight=w / w.mean\(\)'):
    observe(normal(8, 2), mask=mask)


@pytest.mark.parametrize('mask', [jnp.arange(8) < 3, np.arange(8) < 3, (jnp.arange(8) < 3).astype(jnp.int32)])
def test_masks_of_booleans_and_integers(mask):
  params, x = normals({'a': (4, 2)}), normal(8, 4)

  def loss(p, x):
    z = kron.observe.gaussian(x @ p['a'], mask=mask)
    return (HALF(z) * mask).sum() / mask.sum()

  stats = statistics(loss, params, x)
  assert stats.examples == 3
  close(stats.means('a')['G'][0], np.eye(2), 1e-5)


@pytest.mark.wrong_types
@pytest.mark.parametrize('weight', [jnp.ones(7), jnp.ones((8, 2)), jnp.ones((1, 8))])
def test_weights_of_another_shape_are_refused(weight):
  with pytest.raises(kron.CurvatureError, match='give one number, or for outputs'):
    kron.observe.gaussian(normal(8, 2), weight=weight)


def test_a_weight_under_vmap_is_each_examples_own():
  params, x, w = normals({'a': (4, 2)}), normal(8, 4), jnp.linspace(1.0, 9.0, 8)
  one = lambda p, x, w: w * HALF(kron.observe.gaussian(x @ p['a'], weight=w))  # noqa: E731
  loss = lambda p, x, w: jax.vmap(one, (None, 0, 0))(p, x, w).mean()  # noqa: E731
  close(statistics(loss, params, x, w).means('a')['G'][0], w.mean() * np.eye(2), 1e-5)
  same = lambda p, x, w: jax.vmap(one, (None, 0, None))(p, x, w[2]).mean()  # noqa: E731
  close(statistics(same, params, x, w).means('a')['G'][0], w[2] * np.eye(2), 1e-5)


def test_examples_for_marks_of_several_sizes_is_refused_at_construction():
  params = normals({k: SHAPES[k] for k in 'ab'})
  loss, *xs = two_terms((16, 4))
  for examples in (16, 4, lambda p, a, b: 16):
    with pytest.raises(kron.CurvatureError, match='the marks have 4 and 16 observations; leave it out'):
      kron.curvature(loss, params, *xs, fisher='exact', examples=examples)
  equal, *xs = two_terms((6, 6))
  kron.curvature(equal, params, *xs, fisher='exact', examples=6)


# --- observations of one number


SQUEEZED = {
  'a column': (lambda x, w: (x @ w)[:, 0], 1),
  'a sum': (lambda x, w: (x @ w).sum(-1), 1),
  'two axes for one event': (lambda x, w: x @ w, 2),
  'a scalar': (lambda x, w: (x @ w).mean(), 0),
  'a vector of classes': (lambda x, w: (x @ w).mean(0), 1),
}


@pytest.mark.wrong_types('a scalar')
@pytest.mark.parametrize('name', SQUEEZED)
def test_an_event_that_takes_every_axis_is_refused(name):
  make, event_ndims = SQUEEZED[name]
  params, x = normals({'a': (4, 1 if name == 'a column' else 3)}), normal(8, 4)
  loss = lambda p, x: 0.5 * (kron.observe.gaussian(make(x, p['a']), event_ndims=event_ndims) ** 2).mean()  # noqa: E731
  with pytest.raises(
    kron.CurvatureError, match=r'would be one observation of \d+ numbers.*event_ndims=.*\[\.\.\., None\]'
  ):
    kron.curvature(loss, params, x, fisher='exact')


@pytest.mark.long
def test_remedies_of_a_squeezed_output():
  """event_ndims=0, a last axis of one, and vmap give the curvature of the loss."""
  params, x, y = normals({'a': (4, 1)}), normal(64, 4), normal(64)
  plain = lambda p, x, y: 0.5 * (((x @ p['a'])[:, 0] - y) ** 2).mean()  # noqa: E731
  right = hessian(plain, params, 'a', x, y)

  def no_axes(p, x, y):
    z = kron.observe.gaussian((x @ p['a'])[:, 0], y, event_ndims=0)
    return 0.5 * ((z - y) ** 2).mean()

  def column(p, x, y):
    z = kron.observe.gaussian(x @ p['a'], y[:, None])
    return 0.5 * ((z - y[:, None]) ** 2).sum(-1).mean()

  def each(p, x, y):
    one = lambda x, y: 0.5 * ((kron.observe.gaussian(x @ p['a'], y[None]) - y) ** 2).sum()  # noqa: E731
    return jax.vmap(one)(x, y).mean()

  def in_a_scan(p, x, y):
    one = lambda s, xy: (s + 0.5 * ((kron.observe.gaussian(xy[0] @ p['a']) - xy[1]) ** 2).sum(), None)  # noqa: E731
    return jax.lax.scan(one, 0.0, (x, y))[0] / 64

  for loss in (no_axes, column, each, in_a_scan):
    stats = statistics(loss, params, x, y)
    close(block(stats, 'a'), right, 1e-4)
    assert stats.examples == 64


# --- what else a mark reads


@pytest.mark.long('shape0', 'shape1', 'shape2', 'shape4')
@pytest.mark.parametrize('shape', [(3,), (1, 3), (6, 3), (6, 1), ()])
def test_a_variance_of_each_output(shape):
  params, x = normals({'a': (4, 3)}), normal(6, 4)
  variance = jnp.exp(normal(*shape, seed=4))
  loss = lambda p, x: 0.5 * (kron.observe.gaussian(x @ p['a'], variance=variance) ** 2 / variance).sum(-1).mean()  # noqa: E731
  g = statistics(loss, params, x).means('a')['G'][0]
  close(g, np.diag(np.broadcast_to(1 / variance, (6, 3)).mean(0)), 1e-5)
  draws = jax.vmap(lambda k: kron.curvature(loss, params, x).value_and_grad(params, x, key=k)[2].sums['a']['G'][0])
  sampled = draws(jax.random.split(jax.random.key(0), 3000)).mean(0) / 6
  close(sampled, g, 0.1)


def test_every_axis_of_a_variance_must_fit():
  x = jnp.ones((4, 5))
  for shape in ((), (5,), (1,), (4, 1), (1, 5), (4, 5)):
    kron.observe.gaussian(x, variance=jnp.ones(shape))
  for shape in ((4,), (3, 5), (4, 4), (5, 4), (1, 4, 5)):
    with pytest.raises(kron.CurvatureError, match='does not broadcast'):
      kron.observe.gaussian(x, variance=jnp.ones(shape))


def test_a_variance_that_does_not_fit_or_is_learned_is_refused():
  params, x = normals({'a': (4, 3), 'rho': (3,)}), normal(6, 4)
  with pytest.raises(kron.CurvatureError, match='does not broadcast'):
    kron.observe.gaussian(x, variance=jnp.ones(3))
  with pytest.raises(kron.CurvatureError, match='must be above zero'):
    kron.observe.gaussian(x, variance=0.0)
  learned = {
    'a parameter': lambda p, x: jnp.exp(p['rho']),
    'an output': lambda p, x: jnp.exp(x @ p['a']),
  }
  for variance in learned.values():
    loss = lambda p, x, v=variance: HALF(kron.observe.gaussian(x @ p['a'], variance=v(p, x)) / v(p, x)).mean()  # noqa: E731
    for fisher in ('exact', 'empirical'):
      with pytest.raises(kron.CurvatureError, match=r'hold it constant by jax\.lax\.stop_gradient'):
        kron.curvature(loss, params, x, fisher=fisher)


@pytest.mark.long
def test_a_pair_of_integers_is_no_key():
  x, ids = jnp.ones((2, 3)), jnp.array([3, 4], jnp.uint32)
  params = {'w': jnp.ones((3, 2)), 't': jnp.ones((8, 2))}
  loss = lambda p, x, ids: HALF(kron.observe.gaussian(x @ p['w'] + p['t'][ids])).mean()  # noqa: E731
  with pytest.raises(kron.CurvatureError, match='hold 0 PRNG keys'):
    kron.curvature(loss, params, x, ids).value_and_grad(params, x, ids)


RAW = {
  'drawn from': lambda x, k: x * jax.random.bernoulli(k, 0.5, x.shape),
  'split first': lambda x, k: x * jax.random.bernoulli(jax.random.split(k)[0], 0.5, x.shape),
  'in a jit': lambda x, k: jax.jit(lambda x, k: x * jax.random.normal(k, x.shape))(x, k),
  'in a remat': lambda x, k: jax.checkpoint(lambda x, k: x * jax.random.normal(k, x.shape))(x, k),
  'in a branch': lambda x, k: jax.lax.cond(x[0, 0] > 0, lambda: x * jax.random.normal(k, x.shape), lambda: x),
}


@pytest.mark.parametrize('name', RAW)
def test_a_raw_key_that_the_loss_draws_from_is_one(name):
  x, params, key = normal(5, 3), {'w': jnp.ones((3, 2))}, jax.random.PRNGKey(3)
  loss = lambda p, x, k: HALF(kron.observe.gaussian(RAW[name](x, k) @ p['w'])).mean()  # noqa: E731
  assert jax.jit(kron.curvature(loss, params, x, key).value_and_grad)(params, x, key)[2].examples == 5
