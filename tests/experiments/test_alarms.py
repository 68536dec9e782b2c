"""Alarms and what they are measured by: hand-worked cases, and detectors on pictures whose motion is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from kronmesh import data
from kronmesh.tasks.video import alarms, baselines
from tests import commands

ROOT = Path(__file__).parents[2]

# Three scenes of four frames: an event at frames 2 and 3, one at 1 and 2, none.
LABEL = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
SCORE = np.array([[0.1, 0.2, 0.9, 0.8], [0.3, 0.2, 0.7, 0.4], [0.1, 0.5, 0.1, 0.6]])


def test_areas_by_counting_pairs():
  on, off = SCORE[LABEL == 1], SCORE[LABEL == 0]
  assert alarms.frame_auc(LABEL, SCORE) == pytest.approx(np.mean(on[:, None] > off) + np.mean(on[:, None] == off) / 2)
  assert alarms.scene_auc(LABEL, SCORE) == 1.0 and alarms.scene_precision(LABEL, SCORE) == 1.0
  swapped = np.array([[0.5], [0.9], [0.7]])  # ranks: a positive, a negative, a positive
  assert alarms.scene_precision(np.array([[1], [1], [0]]), swapped) == pytest.approx((1 + 2 / 3) / 2)


def test_detection_by_hand():
  """Of eight normal frames one may be above the threshold: 0.6 is."""
  at = alarms.detection(LABEL, SCORE, 1 / 8, rate=10.0)
  assert at.threshold == 0.5 and at.found == 1.0 and at.delay == pytest.approx((0.0 + 0.1) / 2)
  strict = alarms.detection(LABEL, SCORE, 0.0, rate=10.0)
  assert strict.threshold == 0.6 and strict.found == 1.0
  missed = alarms.detection(LABEL, np.where(LABEL, 0.0, 1.0), 0.0, rate=10.0)
  assert missed.found == 0 and missed.delay == np.inf


def test_anticipation_by_hand():
  label = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
  score = np.array([[0.1, 0.6, 0.9, 0.9], [0.1, 0.1, 0.1, 0.5], [0.7, 0.1, 0.7, 0.8], [0.5, 0.5, 0.1, 0.5]])
  half = alarms.anticipation(label, score, 0.5, rate=2.0, after=2.25)
  assert half.threshold == 0.9 and half.recall == 0.5 and half.seconds == 1.25 and half.an_hour == 0
  every = alarms.anticipation(label, score, 1.0, rate=2.0, after=2.25)
  assert every.threshold == 0.5 and every.recall == 1.0 and every.seconds == pytest.approx((1.75 + 0.75) / 2)
  assert every.an_hour == pytest.approx(4 / (8 / 2 / 3600))  # 0, 2 to 3; 0 to 1, 3


def test_a_difference_has_its_sign():
  rng = np.random.default_rng(0)
  label = (rng.random((60, 10)) < 0.3).astype(int)
  good, poor = label + rng.normal(0, 0.7, label.shape), label + rng.normal(0, 3, label.shape)
  low, high = alarms.difference(alarms.frame_auc, label, good, poor, draws=100)
  assert 0 < low < alarms.frame_auc(label, good) - alarms.frame_auc(label, poor) < high
  assert alarms.difference(alarms.frame_auc, label, good, good, draws=20) == (0.0, 0.0)


def test_the_difference_of_frames():
  frames = np.stack([np.full((4, 5), value) for value in (10, 13, 13, 3)]).astype(np.uint8)
  np.testing.assert_array_equal(baselines.frame_difference(frames), [0, 3, 0, 10])


@pytest.mark.parametrize('growth', [0.0, 0.02, 0.05])
def test_expansion_is_the_growth_a_frame(growth):
  """A texture that grows about the middle by a factor of 1 + growth each frame."""
  texture = 128 + 300 * ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, (64, 96)), 3)
  middle, frames = np.array([31.5, 47.5]), []
  for k in range(6):
    scale = (1 + growth) ** -k
    frames.append(ndimage.affine_transform(texture, [scale, scale], middle * (1 - scale), order=3, mode='nearest'))
  found = baselines.expansion(np.clip(frames, 0, 255).astype(np.uint8))
  assert found[0] == 0
  assert (growth - 0.005 < found[3:]).all() and (found[3:] < 1.3 * growth + 0.01).all()  # of the fastest window


def test_what_moves_to_a_side_does_not_count():
  texture = 128 + 300 * ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, (64, 96)), 3)
  moved = np.stack([ndimage.shift(texture, (0, k), mode='wrap') for k in range(6)])
  assert (baselines.expansion(np.clip(moved, 0, 255).astype(np.uint8)) == 0).all()


@pytest.mark.long
@pytest.mark.parametrize('name', ['accidents', 'anomalies'])
def test_the_command_trains_scores_and_does_neither_twice(name, scene_folder, tmp_path):
  small = ['--config.model.blocks=(1,1)', '--config.model.width=4', '--config.data.batch_size=8', '--config.steps=3']
  args = [
    'scripts/alarms.py',
    f'--config=experiments/configs/{name}.py',
    *small,
    f'--config.data.folder={scene_folder}',
  ]
  args += ['--config.data.eval_batch_size=64', f'--workdir={tmp_path}']
  first, second = (commands.run(*args) for _ in range(2))
  for done in (first, second):
    assert done.returncode == 0, done.stderr
    assert 'frame AUC by kind' in done.stdout and '95 %' in done.stdout
  assert (tmp_path / 'alarms.txt').read_text().strip() in second.stdout and (
    tmp_path / 'alarms.png'
  ).stat().st_size > 1e4
  told = json.loads((tmp_path / 'alarms.json').read_text())
  word = {'accidents': 'expansion', 'anomalies': 'difference of frames'}[name]
  assert set(told['measures']) == {'resnet', word}
  test = data.load_scenes({'accidents': 'dashcam', 'anomalies': 'surveillance'}[name], 'test', folder=scene_folder)
  baseline = baselines.expansion if name == 'accidents' else baselines.frame_difference
  score = np.stack([baseline(f) for f in test.frames])[:, 6:]  # four frames, one of two: seen from the seventh on
  assert told['measures'][word]['frame AUC'] == pytest.approx(alarms.frame_auc(test.label[:, 6:], score))


@pytest.mark.long
def test_a_config_without_scenes_is_refused(tmp_path):
  args = ['scripts/alarms.py', '--config=experiments/configs/digits.py', f'--workdir={tmp_path}']
  done = commands.run(*args)
  assert done.returncode == 2 and "'digits' has no scenes" in done.stderr and done.stderr.count('\n') == 1
