"""Scenes for alarms: what is injected is where its label says; collisions hit, and their twins do not."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from kronmesh import data
from kronmesh.data import dashcam, scenes, surveillance

RNG = np.random.default_rng


@pytest.fixture(scope='module')
def pieces():
  """A street without anybody, and somebody."""
  street = np.clip(RNG(0).normal(130, 8, (surveillance.HEIGHT, surveillance.WIDTH)), 0, 255)
  person = surveillance.Sprite(np.full((16, 6), 20.0), np.ones((16, 6)))
  return np.repeat(street[None], surveillance.FRAMES, 0), [person]


@pytest.mark.brief('0-fall', '1-normal', '2-runner', '3-shake', '0-vehicle', '0-ball', '0-smoke')
@pytest.mark.parametrize('kind', surveillance.Surveillance.KINDS)
@pytest.mark.parametrize('seed', range(4))
def test_an_anomaly_is_where_its_label_says(pieces, kind, seed):
  frames, walkers = pieces
  scene = surveillance.injected(frames.copy(), kind, walkers, RNG(seed))
  assert scene.frames.shape == frames.shape and scene.kind == kind
  first, last = surveillance.BEGINS
  if kind == 'normal':
    assert not scene.label.any()
    return
  on = np.flatnonzero(scene.label)
  assert first <= on[0] < last + 16 and len(on) >= 3 and (np.diff(on) == 1).all()
  if kind != 'fall':  # whoever falls is seen before
    light = np.median(scene.frames / frames, axis=(1, 2), keepdims=True)  # drifts in all scenes
    apart = np.abs(scene.frames / light - frames)
    changed = np.stack([ndimage.median_filter(a, 3).max() for a in apart])
    assert changed[on].min() > changed[: on[0] - 2].max(initial=0) * 0.9
    assert changed[on[len(on) // 2]] > 1.5 * np.median(changed[: first - 2])


def test_falling_turns_whoever_stands(pieces):
  frames, walkers = pieces
  scene = surveillance.injected(frames.copy(), 'fall', walkers, RNG(1))
  dark = lambda t: np.argwhere(scene.frames[t] < 60)  # noqa: E731
  (tall, wide), (low, long) = (np.ptp(dark(t), axis=0) for t in (5, 47))
  assert tall > 2 * wide and long > 2 * low


def test_people_are_cut_out_where_they_are():
  """Of a made film with one of the right size, one too small and one too large."""
  film = np.full((60, surveillance.HEIGHT, surveillance.WIDTH), 150, np.uint8)
  for t in range(60):
    film[t, 20:36, 5 + t : 11 + t] = 30
    film[t, 50:54, 70 - t : 72 - t] = 30
    film[t, 40:70, 20:24] = 30 if t == 7 else 150
  found = surveillance.cut_out(film)
  assert found and all(s.pixels.shape == (16, 6) and (s.pixels[2:-2, 2:-2] == 30).all() for s in found)


@pytest.mark.parametrize('place', [(10.0, 20.0), (10.25, 20.75), (-4.0, -2.0), (66.0, 93.5), (-40.0, 10.0)])
def test_a_sprite_between_pixels_is_interpolated(place):
  sprite = surveillance.Sprite(np.full((8, 6), 200.0), np.ones((8, 6)))
  frame = np.zeros((72, 96))
  seen = surveillance.paste(frame, sprite, *place)
  rows, columns = (np.clip(np.minimum(np.arange(n) + 1, at + s) - np.maximum(np.arange(n), at), 0, 1)
                   for n, at, s in zip((72, 96), place, (8, 6), strict=True))  # fmt: skip
  assert seen == (rows.sum() * columns.sum() > 12)
  if seen:
    assert abs(frame.sum() / 200 - rows.sum() * columns.sum()) < 8  # edges are soft on their outer side alone
    assert abs((frame > 199).sum() - (np.outer(rows, columns) > 0.99).sum()) <= 16


def test_splits_share_no_frame():
  spans = sorted(surveillance.STRETCHES.values())
  assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.long
def test_surveillance_is_made_of_a_film(tmp_path, monkeypatch, scene_folder):
  monkeypatch.setattr(surveillance.Surveillance, 'COUNT', {'train': 6, 'validation': 3, 'test': 18})
  path = Path(scene_folder) / 'street.avi'
  found = {s: data.load_scenes('surveillance', s, folder=str(tmp_path / 'd'), source=str(path)) for s in scenes.SPLITS}
  train, test = found['train'], found['test']
  assert train.frames.shape == (6, 48, 72, 96) and test.kinds == surveillance.Surveillance.KINDS
  assert {test.kinds[k] for k in train.kind} <= {'normal', *surveillance.TRAINED}
  assert np.bincount(test.kind).tolist() == [6, 2, 2, 2, 2, 2, 2] and (test.label.any(1) == (test.kind > 0)).all()
  again = surveillance.Surveillance(source=str(path), data_dir=tmp_path / 'e').scene('test', 4)
  assert (again.frames == test.frames).all((1, 2, 3)).sum() == 1  # made of the split and the number alone

  short = tmp_path / 'short.avi'
  data.write_video(short, np.full((50, 72, 96, 3), 150, np.uint8), rate=10)
  for source, words in (
    (short, 'short.avi: 50 frames of 96x72, not 795 frames of 4:3'),
    ('/nowhere', 'no film /nowhere'),
  ):
    with pytest.raises(data.DataError, match=words):
      data.load_scenes('surveillance', 'test', folder=str(tmp_path / 'f'), source=str(source))


@pytest.mark.parametrize('event', dashcam.EVENTS)
@pytest.mark.parametrize('seed', range(20))
def test_collisions_hit_and_their_twins_do_not(event, seed):
  """By the bodies' ways alone: at the time of contact the camera's car is in it, or never closer than a metre."""
  time = np.arange(0, dashcam.END + 1e-9, 0.01)
  body, braking = dashcam._EVENTS[event](time, 12.0, True, RNG(seed))
  at = np.argmin(np.abs(body.z - dashcam.CONTACT))
  assert abs(time[at] - dashcam.END) < 0.03 and abs(body.x[at]) < body.width / 2 + 0.7 and not braking.any()
  body, braking = dashcam._EVENTS[event](time, 12.0, False, RNG(seed))
  near = (body.z > 0) & (body.z < dashcam.CONTACT + 0.3)
  assert (np.abs(body.x[near]) > body.width / 2 + 0.9).all()
  if event == 'lead':
    assert body.z.min() > 1.5 and braking.max() > 0


def test_a_scene_looms_before_its_collision():
  builder = dashcam.Dashcam(data_dir='/nonexistent')
  for i in (0, 1):
    scene = builder.scene('train', i)
    assert scene.kind == ('lead_collision', 'lead_passes')[i] and scene.frames.shape == builder.SHAPE
    assert scene.label.sum() == (0 if i else 12) and (i or scene.label[-12:].all())
    np.testing.assert_array_equal(scene.frames, builder.scene('train', i).frames)
    assert (scene.frames != builder.scene('validation', i).frames).any()


@pytest.mark.long
def test_light_does_not_tell_how_old_a_scene_is():
  """The change of the sky's brightness has no mean over scenes at any time."""
  builder = dashcam.Dashcam(data_dir='/nonexistent')
  sky = np.stack([builder.scene('train', i).frames[:, 0] for i in range(24)])
  sky = np.median(sky, -1)  # houses come and go
  change = np.diff(sky, axis=1) / sky.mean(1, keepdims=True)
  assert np.abs(change.mean(0)).max() < 4 * change.std() / 24**0.5
  assert change.std() > 0.002


@pytest.mark.parametrize('distance', [2.0, 5.3, 11.0, 40.0])
def test_a_body_is_as_large_as_the_pinhole_says(distance):
  body = dashcam.Body('post', np.array([0.4]), np.array([distance]), 1.0, 2.0, 0.0)
  image = np.full((dashcam.HEIGHT, dashcam.WIDTH), 100.0)
  dashcam.draw(image, body, 0, sky=0.0, haze=1e9, pitch=0.0, yaw=0.0)
  area = (100 - image).sum() / 100
  scale = dashcam.FOCAL / distance
  bottom = dashcam.HORIZON + dashcam.CAMERA * scale
  rows = min(bottom, dashcam.HEIGHT) - max(bottom - 2 * scale, 0)
  left = dashcam.WIDTH / 2 - 0.1 * scale
  np.testing.assert_allclose(area, rows * (min(left + scale, dashcam.WIDTH) - max(left, 0)), rtol=1e-9)


@pytest.mark.parametrize('every', [1, 2])
def test_windows_are_the_clips_that_end_at_every_frame(every):
  frames = RNG(0).integers(0, 256, (3, 12, 4, 6)).astype(np.uint8)
  label = RNG(1).integers(0, 2, (3, 12)).astype(np.uint8)
  scenes = data.Scenes(frames, label, np.zeros(3, np.int32), ('any',), 10.0)
  found, first = data.windows(scenes, 4, every), 3 * every
  clips = np.stack([frames[s, t - first : t + 1 : every] for s in range(3) for t in range(first, 12)]).astype(float)
  n = 3 * (12 - first)
  assert found.inputs.shape == (n, 4, 4, 6, 4) and found.inputs.ndim == 5 and len(found.inputs) == n
  cut = found.inputs[np.arange(n)]
  spread = clips.std((1, 2, 3), keepdims=True) + 1
  np.testing.assert_allclose(cut[..., 0], (clips - clips.mean((1, 2, 3), keepdims=True)) / spread, atol=1e-5)
  before = [
    frames[s, np.maximum(np.arange(t - first, t + 1, every) - 1, 0)] for s in range(3) for t in range(first, 12)
  ]
  np.testing.assert_allclose(cut[..., 1], 4 * (clips - np.stack(before)) / spread, atol=1e-5)
  np.testing.assert_allclose(cut[5, 2, 1, :, 2], [1, 0.2, -0.6, -0.6, 0.2, 1], atol=1e-6)  # of a mirrored clip too
  np.testing.assert_allclose(cut[5, 2, :, 3, 3], [-1, -1 / 3, 1 / 3, 1], atol=1e-6)
  np.testing.assert_array_equal(found.label, [label[s, t] for s in range(3) for t in range(first, 12)])
  np.testing.assert_array_equal(found.inputs[3:7][np.arange(4)], cut[3:7])
  with pytest.raises(data.DataError, match='clips of 13 frames, one of 1, are longer than scenes of 12'):
    data.windows(scenes, 13)


@pytest.mark.parametrize('share', [0.1, 0.5, 0.8, 0.0])
def test_balanced_windows_repeat_the_rarer_label(share):
  label = (RNG(0).random((20, 12)) < share).astype(np.uint8)
  frames = np.broadcast_to(label[..., None, None] * np.uint8(200), (20, 12, 3, 4)).copy()
  frames[..., 0, 0] = 100  # of the frame alone
  plain, found = (
    data.windows(data.Scenes(frames, label, np.zeros(20, np.int32), ('any',), 10.0), 1, balanced=b)
    for b in (False, True)
  )
  np.testing.assert_array_equal(found.label[:240], plain.label)
  if 0 < label.mean() < 1:
    assert abs(found.label.mean() - 0.5) < 1 / len(found.label)
  else:
    assert len(found.label) == 240
  seen = found.inputs[np.arange(len(found.label))][:, 0, 1, 1, 0] > 0
  np.testing.assert_array_equal(seen, found.label == 1)


def test_shrunken_scenes_are_means():
  frames = RNG(0).integers(0, 256, (2, 3, 4, 6)).astype(np.uint8)
  scenes = data.Scenes(frames, np.zeros((2, 3), np.uint8), np.zeros(2, np.int32), ('any',), 10.0)
  small = data.shrunken(scenes, 2).frames
  assert small.shape == (2, 3, 2, 3) and small[1, 2, 1, 0] == np.round(frames[1, 2, 2:4, :2].mean())
  np.testing.assert_array_equal(data.shrunken(scenes, 4).frames, frames)
  for side in (3, 8):
    with pytest.raises(data.DataError, match=f'frames of 6x4 do not shrink to a short side of {side}'):
      data.shrunken(scenes, side)


def test_unknown_names():
  with pytest.raises(data.DataError, match="'street' is unknown; choose from dashcam, surveillance"):
    data.load_scenes('street', 'test')
  with pytest.raises(data.DataError, match="split 'all' is unknown"):
    data.load_scenes('dashcam', 'all')
