"""Training with a graph as the input: scores are what they say, runs resume on any mesh, mistakes are one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import directed_video, links, zero_shot
from kronmesh import data, kron
from kronmesh.data.directed import DirectedMotion
from kronmesh.tasks import graphs
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.graph_data import kinds, known_graph
from kronmesh.train.loop import evaluate_all, train
from tests.data.idx import write_idx
from tests.draws import integers, normal
from tests.experiments.small import build_on, losses
from tests.experiments.test_resume import parts_of


def small_links(folder, mesh='data=4,model=2', preset='umls_rgcn'):
  config = links.get_config(preset)
  config.data.update({'name': 'triples', 'source': folder, 'batch_size': 32, 'eval_batch_size': 24})
  config.model.update({'width': 8, 'bases': 2 if preset == 'umls_rgcn' else 0})
  config.mesh, config.steps, config.eval_every, config.checkpoint_every = mesh, 8, 4, 4
  config.kfac.update({'inverses_every': 2, 'statistics_every': 1})
  return config


def small_images(tmp_path, wordnet, mesh='data=8'):
  write_idx(tmp_path / 'idx', packed=True, train=256, test=64)
  config = zero_shot.get_config()
  config.data.update({'folder': str(tmp_path / 'data'), 'source': str(tmp_path / 'idx'), 'graph_source': wordnet})
  config.data.update({'batch_size': 32, 'eval_batch_size': 32})
  config.model.update({'widths': (4, 8), 'width': 8})
  config.mesh, config.steps, config.eval_every = mesh, 4, 4
  return config


@pytest.mark.long
def test_ranks_are_among_what_is_not_known():
  """Against sorting by hand, ties half, on logits of few values."""
  logits = jnp.round(normal(40, 12) * 2)
  label = integers(12, 40)
  known = jnp.concatenate([label[:, None], integers(15, 40, 5) - 3], 1)
  ranks = graphs.ranks(logits, label, known)
  for row, own, others, rank in zip(*map(np.asarray, (logits, label, known, ranks)), strict=True):
    left = [row[k] for k in range(12) if k == own or k not in others]
    assert rank == 1 + sum(v > row[own] for v in left) + (sum(v == row[own] for v in left) - 1) / 2


def test_scores_that_are_no_numbers_rank_last():
  assert graphs.ranks(jnp.array([[0.0, jnp.nan, 1.0]]), jnp.array([2]), jnp.array([[-1]])) == 3


def test_the_first_links_are_evaluated_both_ways(triples_folder):
  config = small_links(triples_folder, mesh='data=1')
  config.data.update({'eval_examples': 4, 'eval_batch_size': 4})
  batch = next(build_on(config, jax.devices()[:1]).eval_batches())
  (one, other, *_), ends = np.asarray(batch['inputs']), np.asarray(batch['label'])
  relations = len(known_graph(config).relations)
  assert (one[0], ends[0], one[1] + relations) == (ends[1], other[0], other[1])


def test_nodes_are_exchanged_by_a_seed_of_the_graph(tmp_path, wordnet_folder):
  config = small_images(tmp_path, wordnet_folder)
  config.data.graph_shuffled = True
  source = lambda **changes: [config.update(changes), graphs.settings(config, 1)['graph']][1]  # noqa: E731
  one, same = source(), source(seed=5)
  jax.tree.map(np.testing.assert_array_equal, one.source, same.source)
  config.data.graph_seed = 5
  assert any(np.any(a != b) for a, b in zip(one.source, source().source, strict=True))


@pytest.mark.long
def test_clips_whose_classes_are_directions_are_not_mirrored(tmp_path, directed_folder, wordnet_folder):
  config = small_clips(directed_folder, wordnet_folder)
  config.data.augment = True
  with pytest.raises(ConfigError, match='classes of directed_motion are directions; set it to False'):
    build(config)
  config.data.update({'augment': False, 'train_examples': 10})
  assert {'query', 'other'} < set(next(build(config).train_batches(0, 0)))


def test_scores_of_classes_without_images():
  """Of means over 10 examples, 6 of them of seen classes."""
  means = {'loss': 0.3, 'seen': 0.3, 'unseen': 0.1, 'zero_shot': 0.2, 'share_seen': 0.6}
  found = graphs.zero_shot_scores(means)
  assert found == pytest.approx({'loss': 0.5, 'seen': 0.5, 'unseen': 0.25, 'zero_shot': 0.5, 'harmonic': 1 / 3})
  assert graphs.zero_shot_scores({**dict.fromkeys(means, 0.0), 'share_seen': 0.5})['harmonic'] == 0


@pytest.mark.long
def test_unseen_classes_have_no_images_in_training(tmp_path, wordnet_folder):
  config = small_images(tmp_path, wordnet_folder)
  run = build(config)
  batch = next(run.train_batches(0, 0))
  assert not np.isin(batch['label'], config.data.held_out).any()
  state = run.init(0)
  scores = evaluate_all(run, state)
  assert set(scores) == {'loss', 'seen', 'unseen', 'zero_shot', 'harmonic'} and all(
    np.isfinite(v) for v in scores.values()
  )


@pytest.mark.long('umls_rgcn')
@pytest.mark.parametrize('preset', ['umls_rgcn', pytest.param('umls_complex', marks=pytest.mark.long)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, triples_folder, preset):
  brief = preset == 'umls_rgcn'
  config = small_links(triples_folder, 'data=1' if brief else 'data=4,model=2', preset)
  run = build_on(config, jax.devices()[: 1 if brief else 8])
  rows = train(config, tmp_path / 'whole', quiet=True, run=run)
  parts_of(config, tmp_path / 'parts', *((5,) if brief else (2, 5)), run=run)
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
  assert set(rows[-1]) >= {'eval_mrr', 'eval_hits1', 'eval_hits10'}


@pytest.mark.long
def test_a_run_goes_on_on_another_mesh(tmp_path, triples_folder):
  """The graph is in as many parts as the new mesh has."""
  run = build(small_links(triples_folder))
  whole = train(run.config, tmp_path / 'whole', quiet=True)
  config = small_links(triples_folder)
  config.steps = 4
  train(config, tmp_path / 'parts', quiet=True)
  other = small_links(triples_folder, mesh='data=2')
  found = train(other, tmp_path / 'parts', quiet=True, run=build_on(other, jax.devices()[:2]))
  assert found[-1]['eval_loss'] == pytest.approx(whole[-1]['eval_loss'], rel=1e-3)


@pytest.mark.long
def test_meshes_agree(triples_folder):
  """Five steps of K-FAC, on one device and on eight, with the graph in eight parts."""
  found = []
  for mesh, count in (('data=1', 1), ('data=8', 8), ('fsdp=4,model=2', 8)):
    config = small_links(triples_folder, mesh=mesh)
    run = build_on(config, jax.devices()[:count])
    state = run.init(0)
    for number, batch in zip(range(5), run.train_batches(0, 0), strict=False):
      state, metrics = run.step(state, batch, number)
    found.append((float(metrics['loss']), jax.device_get(state.params)))
    assert not [b for b in run.curvature.blocks if b.operator.name not in ('dense', 'embedding', 'unit')]
  for loss, params in found[1:]:
    assert loss == pytest.approx(found[0][0], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-4), params, found[0][1])


def test_only_nodes_that_others_read_are_gathered(triples_folder):
  """The decoder's nodes, and gradients of the tables, are all-reduced."""
  from kronmesh import parallel

  config = small_links(triples_folder, mesh='data=8')
  config.optimizer = 'sgd'
  run = build(config)
  like = lambda tree, s: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, s)  # noqa: E731
  state = like(jax.eval_shape(run.init, 0), run.shardings)
  audit = parallel.audit(run.programs['step'].lower(state, run.batch, False, False).compile(), mesh=run.mesh)
  shared = run.task.model.graph.shared.size * config.model.width * 4
  gathers = audit.select('all-gather')
  assert gathers and all(c.bytes / c.count <= shared for c in gathers)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'data.eval_split': 'dev'}, "config.data.eval_split='dev' is unknown; choose from train, valid, test"),
    ({'model.decoder': 'rescal'}, "decoder='rescal' is unknown"),
    ({'task': 'classify'}, "'links' and 'link_predictor' belong together"),
  ],
)
def test_mistakes_are_one_line(triples_folder, change, words):
  config = small_links(triples_folder)
  config.update_from_flattened_dict(change)
  with pytest.raises(ConfigError, match=words) as error:
    build(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('held_out', [(), (10,), tuple(range(10))])
def test_classes_that_cannot_be_held_out(tmp_path, wordnet_folder, held_out):
  config = small_images(tmp_path, wordnet_folder)
  with config.unlocked():
    config.data.held_out = held_out
  with pytest.raises(ConfigError, match='name some of the classes 0 to 9, not all'):
    build(config)


def test_kfac_covers_every_layer(tmp_path, wordnet_folder):
  run = build(small_images(tmp_path, wordnet_folder))
  names = {b.operator.name for b in run.curvature.blocks}
  assert names >= {'conv', 'dense', 'embedding'} and isinstance(run.curvature, kron.Curvature)


def small_clips(folder, wordnet, mesh='data=4,model=2'):
  config = directed_video.get_config()
  config.data.update({'folder': folder, 'graph_source': wordnet, 'batch_size': 16, 'eval_batch_size': 32})
  config.data.held_out = (11,)  # 'shoe' of the small graph
  config.model.update({'widths': (4, 8), 'width': 4, 'groups': 2})
  config.mesh, config.steps, config.eval_every, config.checkpoint_every = mesh, 4, 4, 2
  config.kfac.update({'inverses_every': 2, 'statistics_every': 1})
  return config


def test_a_noun_fits_one_garment_of_both(directed_folder, wordnet_folder):
  config = small_clips(directed_folder, wordnet_folder)
  over = kinds(config)
  assert over[1].sum() == 3 and over[0, 10] and not over[0, 11]  # itself, its kind, entity
  for split in ('train', 'test'):
    records = DirectedMotion(data_dir=directed_folder, file_format='array_record').as_data_source(split=split)
    loaded = data.load_directed(split, over, config.data.held_out, folder=directed_folder)
    for own, query, label, other in zip(records, loaded.query, loaded.label, loaded.other, strict=True):
      asked = list(own['motions']).index(label)
      assert other == own['motions'][1 - asked] != label
      assert over[own['classes'][asked], query] and not over[own['classes'][1 - asked], query]
    assert (11 in loaded.query) == (split == 'test')
  with pytest.raises(data.DataError, match='no noun is left for a clip of classes'):
    data.load_directed('train', over, tuple(range(13)), folder=directed_folder)


@pytest.mark.long
def test_a_noun_directs_a_network_of_clips(tmp_path, directed_folder, wordnet_folder):
  """Trained and resumed; every layer has factors; another noun gives other logits."""
  config = small_clips(directed_folder, wordnet_folder)
  rows = train(config, tmp_path / 'whole', quiet=True)
  assert set(rows[-1]) >= {'eval_accuracy', 'eval_new_nouns', 'eval_other'}
  parts_of(config, tmp_path / 'parts', 3)
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
  run = build(config)
  kinds = {b.name: b.operator.name for b in run.curvature.blocks}
  assert all(kinds[name] in ('conv', 'dense', 'embedding') for name in kinds if name.endswith(('kernel', 'embedding')))
  state, batch = run.init(0), next(run.train_batches(0, 0))
  variables = {'params': state.params, **state.model_state}
  one, other = (run.task.model.apply(variables, batch['inputs'], jnp.full(16, k)) for k in (0, 1))
  assert np.abs(one - other).max() > 1e-4
