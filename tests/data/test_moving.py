"""Moving Fashion-MNIST: motions are what they are called, and no frame tells them."""

import itertools

import numpy as np
import pytest

from kronmesh import data
from kronmesh.data import moving as module
from kronmesh.data.moving import DIRECTIONS, FRAMES, MOTIONS, SIDE, drawn, moving
from tests.data.idx import write_idx

GARMENT = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)


def middle(frame):
  """Where a bright dot is on the torus, (down, right)."""
  angles = 2 * np.pi * np.arange(SIDE) / SIDE
  waves = [np.angle((frame.sum(1 - axis) * np.exp(1j * angles)).sum()) for axis in range(2)]
  return np.array(waves) * SIDE / (2 * np.pi)


def apart(a, b):
  return (b - a + SIDE / 2) % SIDE - SIDE / 2


@pytest.mark.parametrize('label', range(len(MOTIONS)))
def test_a_motion_is_what_it_is_called(label):
  """A dot in the middle goes one way, at one speed, and stays where the garment turns; one aside goes round."""
  dot = np.zeros((28, 28), np.uint8)
  aside = label >= len(DIRECTIONS)
  dot[13:15, 22 if aside else 13 : 24 if aside else 15] = 255
  frames = moving(dot, label, np.random.default_rng(label))[..., 0].astype(float)
  places = [middle(f) for f in frames]
  steps = np.array([apart(a, b) for a, b in itertools.pairwise(places)])
  if not aside:
    down, right = steps.mean(0)
    words = [w for w, there in (('up', down < -0.5), ('down', down > 0.5)) if there]
    words += [w for w, there in (('left', right < -0.5), ('right', right > 0.5)) if there]
    assert ' '.join(words) == MOTIONS[label] and np.ptp(steps, 0).max() < 0.3
    assert 1 <= np.linalg.norm(steps.mean(0)) <= 3.1
  else:
    # To the right, then down (y grows downwards), then to the left is clockwise: the cross product of steps is positive.
    turns = [np.sign(a[1] * b[0] - a[0] * b[1]) for a, b in itertools.pairwise(steps)]
    assert set(turns) == {1.0 if MOTIONS[label] == 'clockwise' else -1.0}


def test_the_first_frame_is_the_same_in_every_class():
  first = [moving(GARMENT, label, np.random.default_rng(5))[0] for label in range(len(MOTIONS))]
  assert all((f == first[0]).all() for f in first) and first[0].std() > 10


@pytest.mark.parametrize('label', [1, 9])
def test_every_frame_is_anywhere(label):
  """The mean of many clips is flat at any time, as a uniform place makes it, for a motion and for a turn."""
  rng = np.random.default_rng(0)
  clips = np.stack([moving(GARMENT, label, rng) for _ in range(400)])[..., 0] / 255
  for t in (0, FRAMES - 1):
    mean = clips[:, t].mean(0)
    assert mean.std() < 3 * clips[:, t].std() / 400**0.5 and 0.1 < mean.mean() < 0.6


def test_a_frame_that_is_not_turned_or_moved_is_the_garment():
  whole = drawn(GARMENT, np.full(2, (SIDE - 1) / 2), 0.0)
  np.testing.assert_array_equal(whole[2:30, 2:30], GARMENT)
  over = drawn(GARMENT, np.array([(SIDE - 1) / 2, SIDE / 2 + (SIDE - 1) / 2]), 0.0)  # half around
  np.testing.assert_array_equal(np.roll(over, SIDE // 2, 1), whole)


def test_the_set_is_made_of_idx_files(tmp_path, monkeypatch):
  monkeypatch.setattr(module, '_COUNT', {'train': 40, 'test': 20})
  write_idx(tmp_path / 'idx', packed=True, train=30, test=10)
  both = [
    data.load_arrays('moving_fashion_mnist', s, folder=str(tmp_path / 'data'), source=str(tmp_path / 'idx'))
    for s in ('train', 'test')
  ]
  assert [a.inputs.shape for a in both] == [(40, 8, 32, 32, 1), (20, 8, 32, 32, 1)]
  assert np.bincount(both[0].label).tolist() == [4] * 10 and both[0].inputs.max() <= 1
  with pytest.raises(data.DataError, match='moving_fashion_mnist: no IDX files in /nowhere'):
    data.load_arrays('moving_fashion_mnist', 'test', folder=str(tmp_path / 'other'), source='/nowhere')
