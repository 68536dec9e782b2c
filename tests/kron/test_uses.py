"""Marks that say which results are uses of a kernel, and that every example has a copy of a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from tests.draws import normal
from tests.kron.reference import in_shards


def network(p, x, where):
  hidden = jnp.tanh(kron.used(x, where) @ p['w'] + p['b'])
  return jnp.where(where, hidden @ p['out'], 0).sum(1)


@pytest.mark.parametrize('shards', [1, 2])
def test_padding_is_left_out_of_factors(shards):
  """As many places as there are, whatever stands in the padding."""
  params = {'w': normal(3, 4), 'b': normal(4), 'out': normal(4, 2)}
  x, lengths = normal(4, 5, 3), jnp.array([5, 2, 3, 1])
  where = (jnp.arange(5) < lengths[:, None])[..., None]

  def loss(p, x):
    z = kron.observe.gaussian(network(p, x, where))
    return (z**2).mean()

  results = []
  for filled in (0.0, 7.0):
    padded = jnp.where(where, x, filled)
    c = kron.curvature(
      loss, params, padded, fisher='empirical', placement=in_shards(shards), fallback={'out': 'gradient'}
    )
    results.append(jax.jit(c.value_and_grad)(params, padded)[2])
  for stats in results:
    np.testing.assert_array_equal(stats.uses['w']['A'], [lengths.sum()])
    rows = np.concatenate([np.asarray(x)[where[..., 0]], np.ones((int(lengths.sum()), 1))], 1)
    np.testing.assert_allclose(stats.means('w')['A'][0], rows.T @ rows / len(rows), rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), results[0].sums['w']['G'], results[1].sums['w']['G']
  )


def test_masks_of_other_axes_are_refused():
  with pytest.raises(kron.CurvatureError, match=r'where has shape \(4, 5\), x \(4, 5, 3\); give it as many axes'):
    kron.used(normal(4, 5, 3), jnp.ones((4, 5), bool))


def test_copies_explain_what_is_read_in_an_unknown_way():
  """A table of which each example reads other rows, in an order that depends on data."""
  params, x = {'table': normal(6, 3)}, normal(4, 3)

  def loss(p, x, mark=True):
    copies = jnp.broadcast_to(p['table'], (4, 6, 3))
    copies = kron.copies(copies) if mark else copies
    z = kron.observe.gaussian((jnp.sort(copies, 1)[:, :3] * x[:, None]).sum(1))
    return (z**2).mean()

  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  each = jax.vmap(jax.grad(lambda p, x: (((jnp.sort(p['table'], 0)[:3] * x).sum(0)) ** 2).mean()), (None, 0))(params, x)
  expected = (each['table'].reshape(4, -1) ** 2).mean(0)
  np.testing.assert_allclose(stats.means('table')['F'].reshape(-1), expected, rtol=1e-4)


@pytest.mark.parametrize('shape', [(4,), (1, 4), (1, 1, 4)])
def test_a_parameter_with_a_first_axis_of_one_beside_one_example(shape):
  """That axis is no examples': the block is that of the same numbers in a vector."""
  x, scale, shift = normal(1, 5, 4), normal(4, seed=2), normal(4, seed=3)

  def loss(p, x):
    z = kron.observe.gaussian((x * p['scale'] + p['shift']).sum(1))
    return (z**2).mean()

  params = {'scale': scale.reshape(shape), 'shift': shift.reshape(shape)}
  stats = jax.jit(kron.curvature(loss, params, x, fisher='empirical').value_and_grad)(params, x)[2]
  slope = 2 * (x * scale + shift).sum(1)[0] / 4
  u = np.stack([np.asarray(x.sum(1)[0] * slope), np.asarray(5 * slope)], -1)
  np.testing.assert_allclose(stats.means('scale')['F'], u[:, :, None] * u[:, None], rtol=1e-4)


def statistics(loss, params, *args, fisher='empirical'):
  return jax.jit(kron.curvature(loss, params, *args, fisher=fisher).value_and_grad)(params, *args)[2]


def rows_of(x, there):
  """(slot, token, feature) and (slot, token): the mean of a aT over the tokens of each slot that count."""
  return [np.asarray(x[e])[np.asarray(there[e])] for e in range(len(x))]


# The layout of x, the equation, and how x and the mask of (expert, token) get into that layout.
LAYOUTS = {
  'expert first': ('end,edc->enc', (0, 1, 2)),
  'token first': ('ned,edc->nec', (1, 0, 2)),
  'feature first': ('den,edc->enc', (2, 0, 1)),
  'features between': ('edn,edc->nce', (0, 2, 1)),
  'token, feature, expert': ('nde,edc->ecn', (1, 2, 0)),
  'kernel first': ('edc,end->enc', (0, 1, 2)),
}


@pytest.mark.brief(
  'kernel first-numbers0',
  'token first-numbers2',
  'token, feature, expert-numbers1',
  'feature first-numbers1',
  'features between-numbers2',
)
@pytest.mark.parametrize('numbers', [(6, 2), (8, 1), (3, 0)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_uses_of_experts_at_every_layout(layout, numbers):
  """Each expert's A is the mean over its own tokens, and uses are counted for each."""
  equation, order = LAYOUTS[layout]
  tokens, weights = normal(2, 8, 4, seed=1), {'w': normal(2, 4, 3)}
  there = jnp.arange(8) < jnp.array(numbers)[:, None]

  def loss(p, x):
    marked = kron.used(x, there[..., None].transpose(order))
    operands = (p['w'], marked) if equation.startswith('edc') else (marked, p['w'])
    h = jnp.einsum(equation, *operands)
    out = equation.split('->')[1]
    h = jnp.einsum(f'{out},en->nc', h, there.astype(h.dtype))
    return 0.5 * (kron.observe.gaussian(h) ** 2).sum(-1).mean()

  stats = statistics(loss, weights, tokens.transpose(order))
  np.testing.assert_array_equal(stats.uses['w']['A'], numbers)
  for e, rows in enumerate(rows_of(tokens, there)):
    expected = rows.T @ rows / max(len(rows), 1)
    np.testing.assert_allclose(stats.means('w')['A'][e], expected, rtol=1e-5, atol=1e-7)


MOVES = {
  'cast': lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
  'transposed and back': lambda x: x.transpose(1, 0, 2).transpose(1, 0, 2),
  'more axes': lambda x: x[:, None][:, 0],
  'sliced': lambda x: x[:, :5],
  'merged': lambda x: x.reshape(-1, 4),
}


@pytest.mark.parametrize('name', MOVES)
def test_masks_follow_their_input(name):
  x, lengths = normal(6, 5, 4), jnp.array([5, 2, 3, 1, 4, 5])
  where = (jnp.arange(5) < lengths[:, None])[..., None]

  def loss(p, x):
    h = jnp.tanh(MOVES[name](kron.used(x, where)) @ p['w']).reshape(6, 5, 3)
    return 0.5 * (kron.observe.gaussian((h * where).sum(1)) ** 2).sum(-1).mean()

  stats = statistics(loss, {'w': normal(4, 3)}, x)
  rows = np.asarray(x)[np.asarray(where[..., 0])]
  rows = rows.astype(jnp.bfloat16).astype(np.float32) if name == 'cast' else rows
  np.testing.assert_array_equal(stats.uses['w']['A'], [len(rows)])
  np.testing.assert_allclose(stats.means('w')['A'][0], rows.T @ rows / len(rows), rtol=1e-5)


BODIES = {
  'scan over time': lambda x, p: jax.lax.scan(lambda c, v: (c, v @ p['w']), None, x.swapaxes(0, 1))[1].swapaxes(0, 1),
  'scan with a constant': lambda x, p: jax.lax.scan(lambda c, _: (c + x @ p['w'], None), jnp.zeros((6, 5, 3)), None, 1)[
    0
  ],
  'remat': lambda x, p: jax.checkpoint(lambda x, w: x @ w)(x, p['w']),
  'jit': lambda x, p: jax.jit(lambda x, w: x @ w)(x, p['w']),
  'branch': lambda x, p: jax.lax.cond(x[0, 0, 0] > -9, lambda: x @ p['w'], lambda: jnp.zeros((6, 5, 3))),
  'vmap': lambda x, p: jax.vmap(lambda x: x @ p['w'])(x),
}


@pytest.mark.parametrize('name', BODIES)
def test_masks_go_into_bodies(name):
  x, lengths = normal(6, 5, 4), jnp.array([5, 2, 3, 1, 4, 5])
  where = (jnp.arange(5) < lengths[:, None])[..., None]

  def loss(p, x):
    h = jnp.tanh(BODIES[name](kron.used(x, where), p))
    return 0.5 * (kron.observe.gaussian((h * where).sum(1)) ** 2).sum(-1).mean()

  stats = statistics(loss, {'w': normal(4, 3)}, x)
  rows = np.asarray(x)[np.asarray(where[..., 0])]
  np.testing.assert_array_equal(np.asarray(stats.uses['w']['A']).sum(), len(rows))
  np.testing.assert_allclose(stats.means('w')['A'][0], rows.T @ rows / len(rows), rtol=1e-5)


def test_masks_of_attention_heads():
  """Heads with kernels of their own, of sequences of their own lengths."""
  x, there = normal(4, 6, 5), jnp.arange(6) < jnp.array([6, 1, 3, 2])[:, None]

  def loss(p, x):
    marked = kron.used(x[:, :, None], there[:, :, None, None])
    h = jnp.einsum('bthd,hdk->bhtk', jnp.broadcast_to(marked, (4, 6, 2, 5)), p['w'])
    return 0.5 * (kron.observe.gaussian((h * there[:, None, :, None]).sum((1, 2))) ** 2).sum(-1).mean()

  stats = statistics(loss, {'w': normal(2, 5, 3)}, x)
  rows = np.asarray(x)[np.asarray(there)]
  np.testing.assert_array_equal(stats.uses['w']['A'], [12, 12])
  for head in range(2):
    np.testing.assert_allclose(stats.means('w')['A'][head], rows.T @ rows / 12, rtol=1e-5)


@pytest.mark.parametrize('marked', [False, True])
def test_one_hot_tables_with_missing_features(marked):
  """Every example has feature 0, a quarter of them have feature 1: A is the frequency of each value among those."""
  v, ids = 5, jnp.stack([jnp.arange(8) % 5, jnp.where(jnp.arange(8) < 2, jnp.arange(8), 5)], 1)
  there = (jnp.arange(8) != 3)[:, None, None]

  def loss(p, ids):
    x = jax.nn.one_hot(ids, v)
    x = kron.used(x, jnp.broadcast_to(there, (8, 2, 1))) if marked else x
    z = kron.observe.gaussian((jnp.einsum('nfv,fvc->nfc', x, p['t']) * (there if marked else 1)).sum(1))
    return 0.5 * (z**2).sum(-1).mean()

  stats = statistics(loss, {'t': normal(2, v, 3)}, ids)
  kept = np.asarray(ids)[np.asarray(there[:, 0, 0])] if marked else np.asarray(ids)
  uses = [(kept[:, f] < v).sum() for f in range(2)]
  np.testing.assert_array_equal(stats.uses['t']['A'], uses)
  counts = [np.bincount(kept[:, f], minlength=v + 1)[:v] / uses[f] for f in range(2)]
  np.testing.assert_allclose(stats.means('t')['A'].reshape(2, v), counts, rtol=1e-6)


def test_masks_of_convolutions_are_of_their_results():
  x, there = normal(3, 7, 2), jnp.arange(7) < jnp.array([7, 2, 4])[:, None]

  def loss(p, x, stride=1, mask=there[..., None]):
    h = jax.lax.conv_general_dilated(
      kron.used(x, mask), p['w'], (stride,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
    )
    h = h * mask if h.shape[1] == mask.shape[1] else h
    return 0.5 * (kron.observe.gaussian(h.sum(1)) ** 2).sum(-1).mean()

  params = {'w': normal(3, 2, 4)}
  stats = statistics(loss, params, x)
  padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 0)))
  patches = np.stack([padded[:, i : i + 3].reshape(3, 6) for i in range(7)], 1)[np.asarray(there)]
  np.testing.assert_array_equal(stats.uses['w']['A'], [13])
  np.testing.assert_allclose(stats.means('w')['A'][0], patches.T @ patches / 13, rtol=1e-5)
  with pytest.raises(kron.CurvatureError, match=r'but the convolution that reads it has \(3, 4, 1\) results'):
    statistics(lambda p, x: loss(p, x, stride=2), params, x)
  halved = there[:, ::2, None]
  stats = statistics(lambda p, x: loss(p, x, stride=2, mask=halved), params, x)
  np.testing.assert_array_equal(stats.uses['w']['A'], [halved.sum()])


UNREAD = {
  'a curve': lambda x, p: jnp.tanh(x) @ p['w'],
  'a sum': lambda x, p: x.sum(1) @ p['w'],
  'a carried value': lambda x, p: jax.lax.scan(lambda c, _: (jnp.tanh(c), c @ p['w']), x, None, 2)[1].sum(0),
  'a concatenation': lambda x, p: jnp.concatenate([x, x], 1) @ p['w'],
  'nothing more': lambda x, p: jnp.sin(x @ p['w']),
}


@pytest.mark.parametrize('name', UNREAD)
def test_a_mark_that_reaches_no_kernel_is_refused(name):
  x, where = normal(6, 5, 4), jnp.ones((6, 5, 1), bool)

  def loss(p, x):
    h = UNREAD[name](x, p) if name == 'nothing more' else UNREAD[name](kron.used(x, where), p)
    h = kron.used(h, jnp.ones_like(h, bool)) if name == 'nothing more' else h
    return 0.5 * (kron.observe.gaussian(h.reshape(6, -1)) ** 2).sum(-1).mean()

  with pytest.raises(kron.CurvatureError, match=r'kron.used at .* marks a value that no matrix product'):
    kron.curvature(loss, {'w': normal(4, 3)}, x, fisher='exact')
