"""What a run records for its page: predictions, compilation, memory, the commit, and the page while it trains."""

import json
import re
import subprocess
import time
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.configs import moving_fashion_mnist
from kronmesh.data.moving import MOTIONS
from kronmesh.train.loop import train
from kronmesh.train.reporting import about, live, predictions, sections
from kronmesh.train.reporting.usage import Spans, Usage, compiling
from tests.experiments.small import built, losses, rows
from tests.experiments.test_pages import HOSTILE, classified, classifier, data_of  # noqa: F401  (a fixture)


def test_spans_inside_others_count_once():
  spans = Spans()
  for start, end in ((1, 2), (3, 4), (0.5, 5), (6, 7)):
    spans.add(start, end)
  assert spans.total == 5.5


def test_compilation_and_memory_are_measured():
  usage = Usage(jax.local_devices())
  jax.jit(lambda x: x * 3.25 + 1)(2.0)
  first = usage.row()
  with usage.apart():
    jax.jit(lambda x: x * 4.25 + 1)(2.0)
  with usage.counted():
    time.sleep(0.05)
  second = usage.row()
  assert 0 < first['compilation_seconds'] < second['compilation_seconds'] and compiling().total > 0
  assert second['compilation_seconds'] - first['compilation_seconds'] == pytest.approx(0.05, abs=0.04)
  assert first['host_peak_bytes'] > 10**7
  device = mock.Mock(memory_stats=lambda: {'peak_bytes_in_use': 123})
  assert Usage([device]).row()['device_peak_bytes'] == 123


def test_the_confusion_matrix_has_every_example_and_its_accuracy(classified, tmp_path):  # noqa: F811
  found = json.loads((classified / 'predictions.json').read_text())
  matrix = np.array(found['matrix'])
  last = [row for row in rows(classified) if 'seconds' in row][-1]
  assert matrix.shape == (10, 10) and matrix.sum() == found['examples'] == 299 and found['right'] == np.trace(matrix)
  assert found['right'] / 299 == pytest.approx(last['eval_accuracy'], abs=1e-5)
  wrong = [p['label'] != p['prediction'] for p in found['pictures']]
  assert len(wrong) == 12 and wrong == sorted(wrong, reverse=True)
  assert all(p['image'].startswith('data:image/png;base64,') for p in found['pictures'])
  page = data_of((classified / 'report.html').read_text())
  assert [c['matrix'] for c in page['charts'] if c['kind'] == 'confusion'] == [found['matrix']]
  # They change nothing, on any mesh, and are not made again at the same step.
  with mock.patch.object(predictions, 'EXAMPLES', 100):
    train(classifier('data=1'), tmp_path / 'one', quiet=True, run=built(classifier('data=1')))
  fewer = json.loads((tmp_path / 'one/predictions.json').read_text())
  np.testing.assert_allclose(losses(classified), losses(tmp_path / 'one'), rtol=1e-4)
  assert np.sum(fewer['matrix']) == fewer['examples'] == 100
  before = (classified / 'predictions.json').stat().st_mtime_ns
  train(classifier(), classified, quiet=True)
  assert (classified / 'predictions.json').stat().st_mtime_ns == before


def test_images_in_strips_are_predicted_whole():
  run, state = mock.Mock(), mock.Mock(average=(), params={}, model_state={})
  images = np.arange(2 * 5 * 4, dtype=np.float32).reshape(2, 5, 4, 1)
  places = np.array([0, 1, -1, 2, 3, -1, 4, -1, -1])
  padded = np.zeros((2, 9, 4, 1), np.float32)
  padded[:, places >= 0] = images
  run.strips, run.mesh = {1: mock.Mock(places=places)}, jax.make_mesh((8,), ('data',))
  run.eval_batches = lambda: [{'inputs': padded, 'label': np.array([1, 2]), 'mask': np.array([1.0, 1.0])}]
  run.task.model.apply = lambda variables, inputs, train: inputs.reshape(inputs.shape[0], -1)
  ((inputs, labels, outputs),) = predictions._outputs(run, state)
  np.testing.assert_array_equal(inputs, images)
  np.testing.assert_array_equal(outputs, images.reshape(2, -1))
  assert list(labels) == [1, 2]


@pytest.mark.long
def test_strips_of_unequal_height_are_predicted_as_they_are_evaluated(tmp_path):
  config = classifier('data=2,space=3')
  config.model = ConfigDict({'name': 'convnet', 'widths': (4, 8), 'classes': 10, 'groups': 2, 'dtype': 'float32'})
  (scores,) = train(config, tmp_path, quiet=True, run=built(config))
  found = json.loads((tmp_path / 'predictions.json').read_text())
  assert found['right'] / found['examples'] == pytest.approx(scores['eval_accuracy'], abs=1e-5)


@pytest.mark.long
def test_clips_have_the_names_of_their_classes(moving_folder, tmp_path):
  config = moving_fashion_mnist.get_config()
  config.update({'steps': 3, 'eval_every': 3})
  config.data.update({'folder': moving_folder, 'batch_size': 64, 'eval_examples': 64, 'eval_batch_size': 64})
  train(config, tmp_path, quiet=True)
  found = json.loads((tmp_path / 'predictions.json').read_text())
  assert found['names'] == list(MOTIONS) and np.sum(found['matrix']) == 64
  page = (tmp_path / 'report.html').read_text()
  assert page.count('class="sample"') == 12 and f'label {MOTIONS[found["pictures"][0]["label"]]}' in page


def test_predictions_that_cannot_be_made_say_why(tmp_path, monkeypatch):
  run, state = mock.Mock(), mock.Mock(step=3)
  run.config.task = 'classify'
  run.mesh.devices.flat = []
  predictions.write_predictions(run, state, tmp_path)
  found = json.loads((tmp_path / 'predictions.json').read_text())
  assert 'could not be computed' in sections.predictions(found)['skipped']
  monkeypatch.setattr(predictions.processes, 'several', lambda: True)
  predictions.write_predictions(run, mock.Mock(step=4), tmp_path)
  assert 'by a single process' in json.loads((tmp_path / 'predictions.json').read_text())['skipped']
  run.config.task = 'next_token'
  predictions.write_predictions(run, state, tmp_path / 'nowhere')
  assert not (tmp_path / 'nowhere').exists()


@pytest.mark.parametrize(
  'shape, kind', [((8, 8, 1), 'png'), ((5, 60, 80, 3), 'jpeg'), ((64, 64, 3), 'jpeg'), ((9,), '')]
)
def test_pictures_are_small(shape, kind):
  url = predictions._picture(np.random.default_rng(0).normal(0, 3, shape))
  assert url.startswith(f'data:image/{kind};base64,') if kind else url == ''
  assert len(url) < 12_000 and bool(url) == sections._is_picture(url)


def test_predictions_of_a_stranger_are_checked():
  picture = 'data:image/png;base64,AAAA'
  good = {'image': picture, 'label': 0, 'prediction': 1, 'probability': 0.5}
  bad = [{**good, 'image': f'{picture}" onerror="x'}, {**good, 'label': 7}, {**good, 'probability': 'x'}, None, 3]
  found = {'classes': 2, 'names': [HOSTILE, 'b'], 'matrix': [[1, 0], [2, 3]], 'pictures': [*bad, good]}
  shown = sections.predictions(found)
  assert [p['prediction'] for p in shown['examples']] == ['b'] and shown['matrix']['names'] == [HOSTILE[:80], 'b']
  for matrix in (None, [[1, 0]], [[1, -1], [0, 0]], [[1, 'x'], [0, 0]], [[0, 0], [0, 0]]):
    assert sections.predictions({**found, 'matrix': matrix})['matrix'] is None
  for other in (
    None,
    [],
    {'classes': 'x'},
    {'classes': True, 'pictures': 3},
    {'task': 'reconstruct', 'pictures': [good]},
  ):
    shown = sections.predictions(other)
    assert not (shown['examples'] or shown['pairs'] or shown['matrix'])


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert about.git_commit() == ''
  git = ['git', '-c', 'user.name=n', '-c', 'user.email=e@example.org']
  (tmp_path / 'file').write_text('a')
  for words in (['init', '--quiet'], ['add', 'file'], ['commit', '--quiet', '--message=m']):
    subprocess.run([*git, *words], check=True)
  assert re.fullmatch('[0-9a-f]{40}', about.git_commit())
  (tmp_path / 'file').write_text('b')
  assert about.git_commit().endswith(' + changes')


def test_the_page_of_a_run_in_training_costs_little_and_fails_nothing(tmp_path, monkeypatch):
  now, written = [0.0], []

  def write(workdir, running):
    written.append(now[0])
    now[0] += cost
    raise ValueError('a damaged row')

  monkeypatch.setattr(live, 'write_report', write)
  monkeypatch.setattr(live.time, 'monotonic', lambda: now[0])
  page, cost = live.LivePage(tmp_path, True, lambda: None), 1.0
  while now[0] < 1000:
    if page.due():
      page.renew()
    now[0] += 1
  assert written[0] == 10 and len(written) <= 11
  cost, page.after = 0.01, now[0]
  page.renew()
  assert page.after == pytest.approx(now[0] + 30)
  assert not live.LivePage(tmp_path, False, lambda: None).due()
