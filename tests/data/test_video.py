"""Video files of all kinds, whole and damaged."""

import os
import random

import numpy as np
import pytest

from kronmesh.data import VideoError, read_video, write_video
from kronmesh.data.video import open_video
from tests.data.films import film, number_of, sound, uneven_film


def numbers(video):
  return [number_of(f) for f in video.frames]


@pytest.mark.parametrize('ending', ['mp4', 'avi', 'mkv', 'mov'])
def test_every_frame_in_order(tmp_path, ending):
  video = read_video(film(tmp_path / f'a.{ending}'))
  assert video.frames.shape == (20, 48, 64, 3) and video.frames.dtype == np.uint8 and video.rate == pytest.approx(10)
  assert numbers(video) == list(range(20))


@pytest.mark.parametrize('codec, pixels', [('mjpeg', 'yuvj420p'), ('libx264', 'yuv420p'), ('libvpx', 'yuv420p')])
def test_codecs(tmp_path, codec, pixels):
  path = tmp_path / ('a.webm' if codec == 'libvpx' else 'a.mkv')
  assert numbers(read_video(film(path, codec=codec, pixels=pixels))) == list(range(20))


def test_another_rate_and_length(tmp_path):
  path = film(tmp_path / 'a.mp4')
  assert numbers(read_video(path, rate=5)) == list(range(0, 20, 2))
  assert numbers(read_video(path, rate=20, longest=0.5)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  assert numbers(read_video(path, rate=0.1)) == [0]
  assert numbers(read_video(path.read_bytes())) == list(range(20))


def test_a_variable_rate_is_made_constant(tmp_path):
  """What is shown at k / rate; a frame that stays is seen again, one that is gone before the next look never."""
  times = [0.0, 0.1, 0.15, 0.2, 0.7, 0.8]
  video = read_video(uneven_film(tmp_path / 'a.mkv', times), rate=10)
  shown = [max(k for k, t in enumerate(times) if t <= i / 10 + 1e-6) for i in range(len(video.frames))]
  assert numbers(video) == shown == [0, 1, 3, 3, 3, 3, 3, 4, 5]


def test_one_frame(tmp_path):
  assert read_video(film(tmp_path / 'a.mp4', count=1)).frames.shape == (1, 48, 64, 3)


@pytest.mark.parametrize('size', [(49, 67), (17, 321), (1, 1)])
def test_odd_sizes(tmp_path, size):
  path = film(tmp_path / 'a.mkv', size=size, codec='ffv1', pixels='yuv444p')
  assert read_video(path).frames.shape == (20, *size, 3)
  assert read_video(path, short_side=15).frames.shape[1:3] == tuple(round(s * 15 / min(size)) for s in size)
  assert read_video(film(tmp_path / 'b.mp4', size=(49, 67))).frames.shape == (20, 48, 66, 3)


def test_files_that_are_no_videos(tmp_path):
  (tmp_path / 'empty.mp4').write_bytes(b'')
  (tmp_path / 'text.mp4').write_text('not a film' * 100)
  (tmp_path / 'folder.mp4').mkdir()
  sound(tmp_path / 'sound.wav')
  for name in ('empty.mp4', 'text.mp4', 'folder.mp4', 'nowhere.mp4', 'sound.wav'):
    with pytest.raises(VideoError, match=name) as caught:
      read_video(tmp_path / name)
    assert '\n' not in str(caught.value)
  with pytest.raises(VideoError, match='no video in it, only audio'):
    read_video(tmp_path / 'sound.wav')


@pytest.mark.parametrize('ending', ['mp4', 'avi', 'mkv', 'webm'])
def test_damaged_files(tmp_path, ending):
  """Sixty accidents: one line that names the file, or frames that are those of the film as far as they go."""
  path = film(tmp_path / f'a.{ending}', count=30, codec='libvpx' if ending == 'webm' else 'mpeg4')
  whole, rng, refused = path.read_bytes(), random.Random(0), 0
  for i in range(15):
    data = bytearray(whole)
    if i % 3 == 0:
      data = data[: rng.randrange(len(data))]
    elif i % 3 == 1:
      for _ in range(rng.choice([20, 200])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    else:
      start = rng.randrange(len(data))
      data[start : start + 400] = bytes(len(data[start : start + 400]))
    bad = tmp_path / f'bad{i}.{ending}'
    bad.write_bytes(data)
    try:
      video = read_video(bad)
    except VideoError as error:
      refused += 1
      assert bad.name in str(error) and '\n' not in str(error) and len(str(error)) < 400
    else:
      assert len(video.frames) >= 0.8 * 30 - 1 and video.frames.shape[1:] == (48, 64, 3)
  assert refused >= 5  # those cut off, and more


def test_frames_of_a_long_film_do_not_wait_in_memory(tmp_path):
  with open_video(film(tmp_path / 'a.mp4', count=200)) as whole:
    frames = whole.frames()
    assert [number_of(next(frames)) for _ in range(3)] == [0, 1, 2]
    before = len(os.listdir('/proc/self/fd'))
  assert len(os.listdir('/proc/self/fd')) < before  # the file is closed


def test_a_file_that_ends_in_its_middle(tmp_path):
  path = film(tmp_path / 'a.mkv', count=60)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(VideoError, match=r'is cut off or damaged: [23]\.\d of its 6\.0 seconds'):
    read_video(path)


def test_pictures_that_the_decoder_made_up(tmp_path):
  """Where bytes are lost it fills in, and marks them."""
  path, rng = tmp_path / 'a.mp4', np.random.default_rng(0)
  write_video(path, list(rng.integers(0, 256, (30, 120, 160, 3), np.uint8)), rate=10)  # whose bytes are all pictures
  data = bytearray(path.read_bytes())
  for at in range(len(data) // 5, 3 * len(data) // 5, 1000):
    data[at] ^= 255
  path.write_bytes(data)
  with pytest.raises(VideoError, match=r'is damaged: \d+ of 30 frames'):
    read_video(path)
