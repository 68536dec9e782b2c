"""Batches depend on the seed and the step alone: not on processes, nor on where a run was resumed."""

import numpy as np
import pytest

from kronmesh import data
from kronmesh.data.datasets import Arrays


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return Arrays(rng.random((10, 6, 6, 1), np.float32), np.arange(10, dtype=np.int32))


def take(dataset, n, start=0):
  return [dataset[i] for i in range(start, start + n)]


def test_every_epoch_is_a_permutation_that_runs_on_over_its_end(arrays):
  labels = np.concatenate([b['label'] for b in take(data.array_batches(arrays, 4, seed=0), 5)])
  for epoch in labels.reshape(2, 10):
    assert sorted(epoch) == list(range(10))
  assert not np.array_equal(labels[:10], labels[10:])


def test_images_and_labels_stay_together(arrays):
  for batch in take(data.array_batches(arrays, 4, seed=3), 3):
    np.testing.assert_array_equal(batch['inputs'], arrays.inputs[batch['label']])


def test_the_seed_decides_and_nothing_else(arrays):
  first, again, other = (take(data.array_batches(arrays, 4, seed=s, augment=data.shift_and_flip), 3) for s in (1, 1, 2))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a['inputs'], b['inputs'])
  assert any(not np.array_equal(a['label'], b['label']) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize('processes', [2, 4])
def test_parts_of_processes_make_up_the_batch_augmentation_included(arrays, processes):
  whole = data.array_batches(arrays, 8, seed=1, augment=data.shift_and_flip)[5]
  parts = [
    data.array_batches(arrays, 8, seed=1, augment=data.shift_and_flip, shard=(i, processes))[5]
    for i in range(processes)
  ]
  for name in whole:
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_an_iterator_goes_on_from_any_step(arrays):
  batches = data.array_batches(arrays, 4, seed=0)
  for threads in (1, 4):
    for i, batch in zip(range(7, 12), data.stream(batches, 7, threads), strict=False):
      np.testing.assert_array_equal(batch['label'], batches[i]['label'])


@pytest.mark.parametrize('processes', [1, 2])
def test_an_evaluation_sees_every_example_once(arrays, processes):
  seen = []
  for i in range(processes):
    batches = data.ordered_batches(arrays, 4, shard=(i, processes))
    assert len(batches) == 3 and {len(b['label']) for b in batches} == {4 // processes}
    seen += [label for b in batches for label, mask in zip(b['label'], b['mask'], strict=True) if mask]
  assert sorted(seen) == list(range(10))


def test_clips_are_moved_and_mirrored_whole():
  rng = np.random.default_rng(0)
  clips = rng.random((16, 5, 9, 8, 2), np.float32)
  found = data.shift_and_flip(clips, np.random.default_rng(1))
  for t in range(5):
    np.testing.assert_array_equal(found[:, t], data.shift_and_flip(clips[:, t], np.random.default_rng(1)))


def test_shift_and_flip_moves_within_its_reach():
  image = np.zeros((64, 9, 9, 1), np.float32)
  image[:, 4, 3] = 1
  moved = data.shift_and_flip(image, np.random.default_rng(0), pixels=2)
  rows, columns = np.argwhere(moved[..., 0])[:, 1], np.argwhere(moved[..., 0])[:, 2]
  assert len(rows) == 64 and set(rows) == {2, 3, 4, 5, 6} and set(columns) == {1, 2, 3, 4, 5, 6, 7}
