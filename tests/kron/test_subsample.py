"""Statistics by shard add up to those of the batch; those of a part are those of the examples in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kronmesh import kron
from tests.draws import normal
from tests.kron.gallery import GALLERY
from tests.kron.reference import close, in_shards

BRIEF = ('MLP',)
NAMES = [n for n in GALLERY if n != 'hypernetwork']
CASES = [pytest.param(n, marks=[] if n in BRIEF else [pytest.mark.long]) for n in NAMES]


def flattened(stats, blocks):
  return {f'{b.name} {k}': m for b in blocks for k, m in stats.means(b.name).items()}


@pytest.mark.long('MLP')
@pytest.mark.parametrize('name', CASES)
def test_shards_add_up(name):
  case = GALLERY[name]()
  found = []
  for shards in (1, 7):  # the gallery has seven examples
    curvature = kron.curvature(case.loss, case.params, *case.args, fisher='empirical', placement=in_shards(shards))
    value, grads, stats = jax.jit(curvature.value_and_grad)(case.params, *case.args)
    found.append((value, grads, flattened(stats, curvature.blocks)))
    assert stats.by_shard == (shards > 1)
  for a, b in zip(*(jax.tree.leaves(f) for f in found), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * float(jnp.abs(b).max(initial=0)))


def sets(n=12):
  return normal(n, 5, seed=1), normal(n, 3, seed=2), np.arange(n) % 5 != 0


def params():
  return {'w': normal(5, 4, seed=3), 'b': normal(4, seed=4), 'c': normal(4, seed=5), 'v': normal(4, 3, seed=6)}


def loss_fn(params, x, y, mask):
  h = jnp.tanh(x @ params['w'] + params['b']) * params['c']
  z = kron.observe.gaussian(h @ params['v'], mask=mask)
  return (0.5 * ((z - y) ** 2).sum(-1) * mask).sum() / mask.sum()


CHOICES = [(s, a) for s in ('expand', 'reduce') for a in ('kronecker', 'unit', 'diagonal')]


@pytest.mark.long
@pytest.mark.parametrize(
  'shards, sharing, approximation', [(1, *CHOICES[0]), (3, *CHOICES[0]), *((2, *c) for c in CHOICES)]
)
def test_a_subsample_is_the_first_examples_of_every_shard(shards, sharing, approximation):
  x, y, mask = sets()
  kept = 2 * shards if shards < 3 else 6
  each = 12 // shards
  rows = np.concatenate([np.arange(s * each, s * each + kept // shards) for s in range(shards)])
  options = {'fisher': 'exact', 'sharing': {'[wv]': sharing}, 'approximation': {'[wv]': approximation}}
  whole = kron.curvature(loss_fn, params(), x, y, mask, placement=in_shards(shards), subsample=kept / 12, **options)
  assert 'whole batch' not in str(whole)
  few = kron.curvature(loss_fn, params(), x[rows], y[rows], mask[rows], **options)
  _, grads, stats = jax.jit(whole.value_and_grad)(params(), x, y, mask)
  _, _, expected = jax.jit(few.value_and_grad)(params(), x[rows], y[rows], mask[rows])
  close(stats.examples, mask[rows].sum(), 1e-7)
  for b in few.blocks:
    for k, m in expected.means(b.name).items():
      close(stats.means(b.name)[k], m, 1e-5)
  np.testing.assert_allclose(grads['w'], jax.grad(loss_fn)(params(), x, y, mask)['w'], rtol=1e-4, atol=1e-6)


def test_each_shard_has_the_sum_of_its_own():
  x, y, mask = sets()
  whole = kron.curvature(loss_fn, params(), x, y, mask, fisher='exact', placement=in_shards(3))
  _, _, stats = jax.jit(whole.value_and_grad)(params(), x, y, mask)
  for s in range(3):
    rows = slice(4 * s, 4 * s + 4)
    few = kron.curvature(loss_fn, params(), x[rows], y[rows], mask[rows], fisher='exact')
    _, _, own = jax.jit(few.value_and_grad)(params(), x[rows], y[rows], mask[rows])
    for name, parts in own.sums.items():
      for k, total in parts.items():
        close(stats.sums[name][k][s], total, 1e-5)


def test_a_use_without_examples_says_so():
  """A constant multiplies the kernel: no axis to split along."""
  x, y, mask = sets()

  def loss(params, x, y, mask):
    return loss_fn({**params, 'b': jnp.ones(7) @ params['u']}, x, y, mask)

  own = params()
  own['u'] = normal(7, 4, seed=9)
  del own['b']
  curvature = kron.curvature(loss, own, x, y, mask, placement=in_shards(2), fisher='empirical')
  plain = kron.curvature(loss, own, x, y, mask, fisher='empirical')
  assert 'of the whole batch' in str(curvature)
  stats, expected = (jax.jit(c.value_and_grad)(own, x, y, mask)[2] for c in (curvature, plain))
  jax.tree.map(lambda a, b: close(a, b, 1e-5), stats.means('u'), expected.means('u'))


@pytest.mark.parametrize(
  'options, words',
  [
    ({'placement': in_shards(5)}, '12 examples do not divide'),
    ({'subsample': 0.0}, 'choose one in'),
    ({'placement': in_shards(2), 'subsample': 0.25}, 'not a whole number'),
  ],
)
def test_what_does_not_divide_is_one_line(options, words):
  with pytest.raises(kron.CurvatureError, match=words):
    kron.curvature(loss_fn, params(), *sets(), **options)


@pytest.mark.long
def test_ekfac_and_masked_updates_take_shards():
  x, y, mask = sets()
  results = []
  for shards in (1, 3):
    curvature = kron.curvature(loss_fn, params(), x, y, mask, fisher='exact', placement=in_shards(shards))
    tx = kron.ekfac(0.1, curvature)
    state = tx.init(params())
    _, grads, stats = jax.jit(curvature.value_and_grad)(params(), x, y, mask, basis=kron.basis(state, curvature))
    updates, state = jax.jit(tx.update)(grads, state, params(), stats=stats)
    results.append(optax.apply_updates(params(), updates))
  jax.tree.map(lambda a, b: close(a, b, 1e-4), *results)
