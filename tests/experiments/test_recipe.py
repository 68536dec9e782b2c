"""What large batches need: each part against its formula, and all of it through a resumed run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import digits_classifier
from kronmesh.train import mixing, recipe, schedules
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train


def configured(**changes):
  config = digits_classifier.get_config()
  config.model.hidden, config.data.batch_size, config.mesh = (8,), 64, 'data=8'
  config.steps, config.eval_every, config.optimizer = 8, 4, 'sgd'
  config.update_from_flattened_dict(changes)
  return config


def rates(config):
  schedule = schedules.learning_rate(config[config.optimizer], config)
  return [float(schedule(step)) for step in range(config.steps)]


def test_the_learning_rate_grows_with_the_batch_and_decays_as_chosen():
  own = {'sgd.learning_rate': 0.5, 'sgd.schedule': 'constant', 'recipe.reference_batch': 16}
  assert rates(configured(**own)) == [0.5] * 8
  assert rates(configured(**own, **{'recipe.rate_scaling': 'linear'})) == [2.0] * 8
  assert rates(configured(**own, **{'recipe.rate_scaling': 'sqrt'})) == [1.0] * 8
  own |= {'sgd.schedule': 'polynomial', 'sgd.power': 3.5, 'sgd.warmup_steps': 2}
  found = rates(configured(**own))
  decayed = [0.005 + 0.495 * (1 - step / 6) ** 3.5 for step in range(6)]
  np.testing.assert_allclose(found, [0.0, 0.25, *decayed], rtol=1e-6)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'sgd.warmup_steps': 8}, 'sgd.warmup_steps=8 leaves nothing of steps=8'),
    ({'sgd.schedule': 'linear'}, "sgd.schedule='linear' is unknown"),
    ({'recipe.rate_scaling': 'cubic'}, "recipe.rate_scaling='cubic' is unknown"),
    ({'recipe.rescale_weights': ('*/bias', '*/kernle')}, "'*/kernle' matches no parameter"),
    ({'task': 'reconstruct', 'recipe.mixup': 0.5}, 'recipe.mixup mixes labels'),
    ({'recipe.cutmix': 0.5}, 'recipe.cutmix cuts clips in time; images of digits are (8, 8, 1)'),
    ({'recipe.mixup': 0.5, 'recipe.cutmix': 0.5}, 'has mixup and cutmix; set one to 0'),
    ({'stop_at_target': True, 'target': 0.0}, 'set config.target'),
  ],
)
def test_mistakes_end_in_one_line(changes, words):
  with pytest.raises(ConfigError) as error:
    run = build(configured(**changes))
    run.step(run.init(0), next(run.train_batches(0, 0)), 0)
  assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.long
def test_momentum_follows_the_learning_rate():
  """Each step's momentum is its own share of the peak; a run equals the rule written out."""
  config = configured(**{'sgd.momentum_follows_rate': True, 'sgd.momentum': 0.8, 'sgd.warmup_steps': 3})
  rate = schedules.learning_rate(config.sgd, config)
  momentum = schedules.momentum(config.sgd, rate, schedules.peak(config.sgd, config))
  shares = [float(momentum(step)) for step in range(8)]
  np.testing.assert_allclose(shares, [0.8 * r / config.sgd.learning_rate for r in rates(config)], rtol=1e-6)
  assert shares[0] == 0 and max(shares) == pytest.approx(0.8)
  run = build(config)
  state = run.init(0)
  p = jax.device_get(state.params)
  trace = jax.tree.map(jnp.zeros_like, p)
  gradient = jax.jit(jax.grad(lambda p, b: run.task.loss(p, {}, b)[0]))
  for batch, share, r in zip(run.train_batches(0, 0), shares[:5], rates(config)[:5], strict=False):
    grads = gradient(p, batch)
    trace = optax.tree.add_scale(grads, share, trace)
    p = optax.tree.add_scale(p, -r, trace)
    state, _ = run.step(state, batch, 0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), jax.device_get(state.params), p)


def test_rescaled_weights_keep_their_norm():
  params = {'conv': {'kernel': jnp.ones((3, 3, 2, 8))}, 'dense': {'kernel': jnp.ones((4, 5))}}
  tx = recipe.rescale_weights(('conv/*',))
  updates = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
  new = optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])
  direction = params['conv']['kernel'] + updates['conv']['kernel']
  np.testing.assert_allclose(jnp.linalg.norm(new['conv']['kernel'].ravel()), 4.0, rtol=1e-5)
  np.testing.assert_allclose(new['conv']['kernel'], 4 * direction / jnp.linalg.norm(direction.ravel()), rtol=1e-5)
  np.testing.assert_array_equal(new['dense']['kernel'], params['dense']['kernel'] + updates['dense']['kernel'])


def test_smoothed_labels_are_those_of_optax():
  labels = jnp.array([0, 2, 1])
  own = mixing.soft_labels({'label': labels}, 4, 0.1)
  np.testing.assert_allclose(own, optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.1), rtol=1e-6)


def batch_of(seed, n=6):
  keys = jax.random.split(jax.random.key(seed))
  return {'inputs': jax.random.normal(keys[0], (n, 5)), 'label': jax.random.randint(keys[1], (n,), 0, 3)}


def test_mixup_weighs_images_and_targets_alike():
  batch = batch_of(0)
  mixed, _ = mixing.mix(batch, (), jax.random.key(1), alpha=0.4, cut=0.0, running=False, classes=3)
  own = jax.nn.one_hot(batch['label'], 3)
  # Every row is w times its own and 1 - w times one other; w is the same in all.
  fits = []
  for w in np.unique(np.asarray(mixed['target'])):
    partner = (mixed['inputs'] - w * batch['inputs']) / (1 - w) if w < 1 else batch['inputs']
    labels = (mixed['target'] - w * own) / (1 - w) if w < 1 else own
    match = np.abs(np.asarray(partner)[:, None] - np.asarray(batch['inputs'])[None]).sum(-1).argmin(1)
    fits.append(
      np.allclose(partner, np.asarray(batch['inputs'])[match], atol=1e-3)
      and np.allclose(labels, np.asarray(own)[match], atol=1e-3)
      and sorted(match) == list(range(6))
    )
  assert any(fits)


def test_cutmix_replaces_a_run_of_frames():
  """By those of one other clip, as many in all clips; the target has their share."""
  own = np.arange(6)
  clips = jnp.broadcast_to(own[:, None, None, None, None], (6, 8, 2, 2, 1)).astype(jnp.float32)
  lengths = set()
  for seed in range(12):
    batch = {'inputs': clips, 'label': jnp.asarray(own)}
    mixed, _ = mixing.mix(batch, (), jax.random.key(seed), alpha=0.0, cut=1.0, running=False, classes=6)
    frames = np.asarray(mixed['inputs'])
    assert (frames == frames[:, :, :1, :1]).all()
    frames, partners = frames[:, :, 0, 0, 0].astype(int), []
    for i, clip in enumerate(frames):
      other = np.flatnonzero(clip != i)
      partners.append(clip[other[0]] if len(other) else i)
      assert set(clip) <= {i, partners[-1]} and (np.diff(other) == 1).all()
      np.testing.assert_allclose(mixed['target'][i], np.bincount(clip, minlength=6) / 8, atol=1e-6)
      lengths.add(len(other))
    assert sorted(partners) == list(range(6))
  assert len(lengths) > 3


def test_running_mixup_mixes_with_the_last_mixed_batch():
  config = configured(**{'recipe.mixup': 0.4, 'recipe.running_mixup': True})
  shape = jax.ShapeDtypeStruct((6, 5), jnp.float32)
  nothing = jax.tree.map(
    lambda x: x[..., :3] if x.ndim == 2 and x.shape[-1] == 10 else x, mixing.nothing_mixed(config, shape)
  )
  settings = {'alpha': 0.4, 'cut': 0.0, 'running': True, 'classes': 3}
  first, last = mixing.mix(batch_of(0), nothing, jax.random.key(1), **settings)
  np.testing.assert_array_equal(first['inputs'], batch_of(0)['inputs'])  # there is nothing to mix with yet
  for seed in range(2, 5):
    mixed, new = mixing.mix(batch_of(seed), last, jax.random.key(seed), **settings)
    own = jax.nn.one_hot(batch_of(seed)['label'], 3)
    w = float(jnp.vdot(mixed['inputs'] - last['inputs'], batch_of(seed)['inputs'] - last['inputs']))
    w /= float(jnp.sum((batch_of(seed)['inputs'] - last['inputs']) ** 2))
    assert 0.5 <= w <= 1
    np.testing.assert_allclose(mixed['inputs'], w * batch_of(seed)['inputs'] + (1 - w) * last['inputs'], atol=1e-5)
    np.testing.assert_allclose(mixed['target'], w * own + (1 - w) * last['target'], atol=1e-5)
    np.testing.assert_array_equal(new['inputs'], mixed['inputs'])
    last = new


@pytest.mark.long
def test_a_run_with_all_of_it_resumes_bit_for_bit(tmp_path):
  changes = {'recipe.mixup': 0.4, 'recipe.running_mixup': True, 'recipe.label_smoothing': 0.1, 'optimizer': 'kfac'}
  changes |= {'recipe.rescale_weights': ('*/kernel',), 'kfac.schedule': 'constant', 'kfac.momentum_follows_rate': True}
  train(configured(**changes), tmp_path / 'whole', quiet=True)
  train(configured(**changes, steps=4), tmp_path / 'parts', quiet=True)
  rows = train(configured(**changes), tmp_path / 'parts', quiet=True)
  names = ('step', 'eval_loss', 'eval_accuracy')
  again = [train(configured(**changes), tmp_path / folder, quiet=True) for folder in ('whole', 'parts')]
  whole, parts = ([[row[name] for name in names] for row in found] for found in again)
  assert whole == parts == [[r[k] for k in names] for r in rows] and [r[0] for r in parts] == [4, 8]
  assert rows[1]['seconds'] > rows[0]['seconds']


def test_a_run_stops_at_its_target(tmp_path):
  config = configured(stop_at_target=True, target=0.2, steps=200)
  rows = train(config, tmp_path, quiet=True)
  assert rows[-1]['step'] < 200 and rows[-1]['eval_accuracy'] >= 0.2
  assert all(row['eval_accuracy'] < 0.2 for row in rows[:-1])
  assert train(config, tmp_path, quiet=True) == rows, 'a second call trains nothing'
