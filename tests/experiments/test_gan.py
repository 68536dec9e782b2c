"""Two players in one run: one checkpoint, every mesh, K-FAC on every layer, samples in the report."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import digits_classifier, fashion_mnist_gan
from kronmesh.tasks.gan import generated
from kronmesh.tasks.gan.judge import frechet, in_batches, read_judge
from kronmesh.tasks.gan.networks import networks
from kronmesh.tasks.gan.players import NAMES, config_of
from kronmesh.train import faults
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.schedules import learning_rate
from tests.data.idx import write_idx
from tests.draws import normal
from tests.experiments.small import build_on, losses
from tests.experiments.test_resume import parts_of

long = pytest.mark.long


def small_gan(tmp_path, optimizer='adam', mesh='data=4,model=2', steps=6):
  if not (tmp_path / 'idx').exists():
    write_idx(tmp_path / 'idx', packed=True, train=128, test=64)
  config = fashion_mnist_gan.get_config()
  config.data.update({'folder': str(tmp_path / 'data'), 'source': str(tmp_path / 'idx')})
  config.data.update({'batch_size': 16, 'eval_batch_size': 32, 'eval_examples': 40})
  config.model.update({'width': 4, 'latent': 6, 'embedding': 4})
  config.optimizer, config.mesh, config.steps = optimizer, mesh, steps
  config.eval_every = config.checkpoint_every = 3
  config.kfac.update({'statistics_every': 2, 'inverses_every': 2, 'subsample': 0.5})  # one of a shard's two examples
  return config


@pytest.mark.long('adam-False')
@pytest.mark.parametrize(
  'optimizer, extras', [('adam', False), *(pytest.param(o, True, marks=long) for o in ('adam', 'kfac'))]
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer, extras):
  """Bit for bit, of both players; extras: R1, augmentation, attention and two steps of the discriminator."""
  config = small_gan(tmp_path, optimizer, 'data=4,model=2' if extras else 'data=1', steps=6 if extras else 4)
  if extras:
    config.gan.update({'r1': 0.1, 'augment': ('translation', 'cutout'), 'discriminator_steps': 2})
    config.model.attention = True
    config.kfac.subsample = 1.0  # a shard has one example of a discriminator's step
  run = build_on(config, jax.devices()[: 8 if extras else 1])
  train(config, tmp_path / 'whole', quiet=True, run=run)
  parts_of(config, tmp_path / 'parts', *((2, 4) if extras else (2,)), run=run)
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
  pictures = [(tmp_path / name / f'samples/{config.steps:08}.png').read_bytes() for name in ('whole', 'parts')]
  assert pictures[0] == pictures[1]
  report = (tmp_path / 'whole/report.html').read_text()
  assert report.count('data:image/png;base64,') == 2 and f'samples after {config.steps} steps' in report


def after_steps(config, devices, count=3):
  run = build_on(config, jax.devices()[:devices])
  state = run.init(0)
  for number, batch in zip(range(count), run.train_batches(0, 0), strict=False):
    state, metrics = run.step(state, batch, number)
  return {k: float(metrics[k]) for k in ('loss', 'generator_loss')}, jax.device_get(state.params)


@long
@pytest.mark.parametrize('optimizer, mesh', [('sgd', 'data=8'), ('kfac', 'data=4,model=2'), ('kfac', 'fsdp=4,data=2')])
def test_meshes_agree(tmp_path, optimizer, mesh):
  """Losses and parameters; means of batch norms are those of the whole batch."""
  config = small_gan(tmp_path, optimizer, mesh)
  config.sgd.update({'learning_rate': 0.01, 'momentum': 0.0})
  config.kfac.subsample = 1.0  # parts of a batch are taken by shard: of other meshes they are other examples
  expected, params = after_steps(_with(config, 'data=1'), 1)
  found, own = after_steps(config, 8)
  assert found == pytest.approx(expected, rel=2e-3, abs=2e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-2, atol=5e-3), own, params)


def _with(config, mesh):
  other = config.copy_and_resolve_references()
  other.mesh = mesh
  return other


@pytest.mark.long
def test_kfac_covers_every_layer_of_both(tmp_path):
  config = small_gan(tmp_path, 'kfac')
  config.model.attention = True
  run = build(config)
  for curvature in run.curvatures.values():
    assert not curvature.gradient_only
    kinds = {b.name: b.operator.name for b in curvature.blocks}
    assert all(
      kinds[name] in ('conv', 'dense', 'embedding') for name in kinds if name.endswith(('kernel', 'embedding'))
    )
  assert 'generator' in run.coverage and 'discriminator' in run.coverage


@pytest.mark.long
def test_each_player_has_its_own_optimiser(tmp_path):
  config = small_gan(tmp_path, 'kfac', 'data=1')
  config.gan.update({'generator': 'muon', 'discriminator': 'adam'})
  run = build_on(config, jax.devices()[:1])
  assert run.curvature is None
  state, metrics = run.step(run.init(0), next(run.train_batches(0, 0)), 0)
  assert not metrics['held'] and set(state.opt_state) == {'generator', 'discriminator'}


@pytest.mark.long
def test_a_step_that_is_not_sound_changes_neither_player(tmp_path):
  run = build_on(small_gan(tmp_path, mesh='data=1'), jax.devices()[:1])
  batch = next(run.train_batches(0, 0))
  broken = {**batch, 'inputs': jnp.full_like(batch['inputs'], jnp.nan)}
  before = jax.device_get(run.init(0).params)
  state, metrics = run.step(run.init(0), broken, 0)
  assert metrics['held'] and int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


@pytest.mark.long
def test_a_judge_scores_what_is_made(tmp_path):
  config = small_gan(tmp_path, mesh='data=1', steps=3)  # writes the images
  judge = digits_classifier.get_config()
  judge.data.update({'name': 'fashion_mnist', 'folder': str(tmp_path / 'data'), 'source': str(tmp_path / 'idx')})
  judge.data.update({'batch_size': 32, 'eval_batch_size': 32})
  judge.steps, judge.model.hidden, judge.mesh = 2, (8,), 'data=1'
  train(judge, tmp_path / 'judge', quiet=True, run=build_on(judge, jax.devices()[:1]))
  config.gan.judge = str(tmp_path / 'judge')
  rows = train(config, tmp_path / 'run', quiet=True, run=build_on(config, jax.devices()[:1]))
  assert 0 <= rows[-1]['eval_agreement'] <= 1
  own = read_judge(tmp_path / 'judge')
  images = np.random.default_rng(0).random((50, 28, 28, 1), np.float32)
  features = in_batches(own.features, images, 20)
  assert features.shape == (50, 8) and own.name == 'mlp of judge'
  with pytest.raises(ConfigError, match="is a run of 'generate'; a judge is a run of a classifier"):
    read_judge(tmp_path / 'run')


@pytest.mark.long
def test_a_generator_in_use_has_the_means_of_its_own_parameters():
  """However far off those are that it was saved with: images are those that the norms of a large batch make."""
  config = fashion_mnist_gan.get_config()
  config.model.width = 4
  net = networks(config).generator
  label, noise = jnp.arange(2000) % 10, normal(2000, net.latent)
  found = jax.jit(partial(net.init, train=True))(jax.random.key(0), noise[:20], label[:20])
  variables = nn.meta.unbox(dict(found))
  variables['batch_stats'] = jax.tree.map(lambda x: 3 * x + 2, variables['batch_stats'])
  own = generated.standing(net, variables)
  images = jax.jit(net.apply, static_argnames=('train', 'mutable'))
  expected, _ = images(own, noise, label, train=True, mutable=('batch_stats', 'spectral'))
  made, before = (images(v, noise, label) for v in (own, variables))
  # Of 2,000 images and of about as many: a few percent of the difference that there was.
  assert jnp.abs(made - expected).mean() < 0.05 * jnp.abs(before - expected).mean()
  jax.tree.map(np.testing.assert_array_equal, own['params'], variables['params'])


def test_schedules_of_a_discriminator_count_its_own_steps(tmp_path):
  config = small_gan(tmp_path)
  config.gan.discriminator_steps = 4
  config.adam.update({'schedule': 'cosine', 'warmup_steps': 2})
  own = {name: config_of(config, name) for name in NAMES}
  rate = {name: learning_rate(c.adam, c) for name, c in own.items()}
  for step in range(config.steps):
    assert rate['generator'](step) == pytest.approx(float(rate['discriminator'](4 * step)))


@pytest.mark.long
def test_layers_of_both_players_have_their_names_in_faults(tmp_path):
  run = build_on(small_gan(tmp_path, mesh='data=1'), jax.devices()[:1])
  order, finite = faults._outputs(run, run.init(0), next(run.train_batches(0, 0)))
  assert {path.split('/')[0] for path in order} == {'generator', 'discriminator'} and all(finite.values())
  assert {'generator/classes', 'generator/block_1', 'discriminator/block_0/first_norm'} < set(order)


def test_labelled_images_and_made_ones_are_those_of_the_seed_that_trains(tmp_path):
  """One built run serves several."""
  config = classifier_of(tmp_path, '')
  small_gan(tmp_path)  # writes the images
  config.data.train_examples = 32
  run = build(config)
  batches = [next(run.train_batches(seed, 0)) for seed in (0, 1)]
  assert not np.isin(
    np.asarray(batches[1]['inputs']).sum((1, 2, 3)), np.asarray(batches[0]['inputs']).sum((1, 2, 3))
  ).all()
  config.seed = 1
  np.testing.assert_array_equal(next(build(config).train_batches(1, 0))['inputs'], batches[1]['inputs'])


def test_frechet_distance_of_gaussians():
  """Of diagonal ones in closed form: |m - n|^2 + sum of (s - t)^2."""
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((200000, 3)) * [1, 2, 3], rng.standard_normal((200000, 3)) * [2, 2, 1] + [1, 0, 0]
  assert frechet(a, b) == pytest.approx(1 + 1 + 4, rel=0.02)
  assert abs(frechet(a, a)) < 1e-6


@pytest.mark.long("change8-config.gan.generator='ekfac' .* made for one network")
@pytest.mark.parametrize(
  'change, words',
  [
    ({'gan.generator': 'stale_kfac'}, "config.gan.generator='stale_kfac' .* made for one network"),
    ({'gan.discriminator': 'adm'}, "config.gan.discriminator='adm' is unknown"),
    ({'gan.augment': ('flip',)}, "config.gan.augment has 'flip'; choose from colour"),
    ({'model.size': 32}, r'images of fashion_mnist are \(28, 28, 1\); config.model makes \(32, 32, 1\)'),
    ({'gan.discriminator_steps': 3}, 'two players take batches that divide'),
    ({'microbatches': 2}, r"config.microbatches=2 does not work with config.task='generate'"),
    ({'gan.judge': '/nowhere'}, 'no export in /nowhere/export'),
    ({'gan.r1': -1.0}, 'config.gan.r1=-1 must be'),
    ({'gan.generator': 'ekfac'}, "config.gan.generator='ekfac' .* made for one network"),
    (
      {'optimizer': 'kfac', 'faults.spike': 'damp'},
      "config.faults.spike='damp' does not work with .* set it to 'skip'",
    ),
    ({'keep_best': 1}, 'config.keep_best=1 needs a score'),
    ({'target': 0.5}, 'config.target=0.5 needs a score, .* name a finished classifier by config.gan.judge'),
    ({'generated.run': '/nowhere'}, "config.generated.run does not work with config.task='generate': 'classify' does"),
  ],
)
def test_mistakes_are_one_line(tmp_path, change, words):
  config = small_gan(tmp_path)
  config.update_from_flattened_dict(change)
  with pytest.raises(ConfigError, match=words) as error:
    build(config)
  assert '\n' not in str(error.value)


def classifier_of(tmp_path, run, mesh='data=4,model=2'):
  config = digits_classifier.get_config()
  config.data.update({'name': 'fashion_mnist', 'folder': str(tmp_path / 'data'), 'source': str(tmp_path / 'idx')})
  config.data.update({'batch_size': 32, 'eval_batch_size': 32})
  config.generated.update({'run': str(run), 'share': 0.25})
  config.steps, config.model.hidden, config.mesh = 4, (8,), mesh
  config.eval_every = config.checkpoint_every = 2
  return config


@long
def test_a_share_of_a_batch_is_made_and_filtered(tmp_path):
  """Of every shard; the same when a run resumes; surer images where there are some."""
  train(small_gan(tmp_path, steps=1), tmp_path / 'gan', quiet=True)
  config = classifier_of(tmp_path, tmp_path / 'gan')
  plain = config.copy_and_resolve_references()
  plain.generated.run = ''
  run = build(config)
  real, mixed = (next(iter(b.train_batches(0, 3))) for b in (build(plain), run))
  assert mixed['inputs'].sharding.is_equivalent_to(real['inputs'].sharding, 4)
  same = (np.asarray(real['inputs']) == np.asarray(mixed['inputs'])).all((1, 2, 3)).reshape(4, 8)
  assert (same == ([False] * 2 + [True] * 6)).all()
  again = next(iter(run.train_batches(0, 3)))
  np.testing.assert_array_equal(again['inputs'], mixed['inputs'])
  other = next(iter(run.train_batches(0, 4)))
  assert not (np.asarray(other['inputs'])[::8] == np.asarray(mixed['inputs'])[::8]).all()
  train(config, tmp_path / 'whole', quiet=True)
  parts_of(config, tmp_path / 'parts', 3)
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')

  judged = config.copy_and_resolve_references()
  judged.generated.update({'judge': str(tmp_path / 'whole'), 'keep': 0.99, 'tries': 6})
  judge = read_judge(tmp_path / 'whole')
  chances = []
  for own in (config, judged):
    batch = next(iter(build(own).train_batches(0, 0)))
    made = np.asarray(batch['inputs']).reshape(4, 8, 28, 28, 1)[:, :2].reshape(8, 28, 28, 1)
    label = np.asarray(batch['label']).reshape(4, 8)[:, :2].reshape(8)
    chances.append(np.asarray(jax.nn.softmax(judge.logits(made)))[np.arange(8), label])
  assert (chances[1] >= chances[0]).all() and (chances[1] > chances[0]).any()

  for change, words in (
    ({'generated.share': 0.01}, 'config.generated.share=0.01 of 32 examples on 4 shards is none'),
    (
      {'generated.share': 1.5},
      'config.generated.share=1.5 of 32 examples on 4 shards is more than all; it is at most 1',
    ),
    ({'model.classes': 11}, 'makes images of 10 classes; config.model.classes=11'),
    ({'data.name': 'digits', 'data.source': ''}, r'makes images of \(28, 28, 1\); those of digits are \(8, 8, 1\)'),
    ({'generated.run': str(tmp_path / 'whole')}, "is a run of 'classify'; a generator is a run of 'generate'"),
  ):
    wrong = config.copy_and_resolve_references()
    wrong.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=words):
      build(wrong)
