"""Small video files whose frames tell which they are, and damaged ones."""

from fractions import Fraction

import av
import numpy as np

from kronmesh.data import write_video


def frame(k, height=48, width=64):
  """A bar that moves with k over grey that brightens with it: compression leaves both to be read."""
  picture = np.full((height, width, 3), 40 + 6 * (k % 30), np.uint8)
  picture[:, (4 * k) % width :][:, :8] = [220, 60, 60]
  return picture


def number_of(picture):
  """Which frame it is, from its grey."""
  return round((float(np.median(picture[..., 1])) - 40) / 6)


def film(path, count=20, rate=10, size=(48, 64), **options):
  write_video(path, [frame(k, *size) for k in range(count)], rate, **options)
  return path


def uneven_film(path, times, codec='mpeg4'):
  """Frame k is shown at times[k] seconds."""
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=30)
    stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
    stream.codec_context.time_base = Fraction(1, 1000)
    for k, time in enumerate(times):
      picture = av.VideoFrame.from_ndarray(frame(k), format='rgb24')
      picture.pts, picture.time_base = round(1000 * time), Fraction(1, 1000)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  return path


def sound(path):
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
    samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format='s16', layout='mono')
    samples.sample_rate = 8000
    container.mux(stream.encode(samples))
    container.mux(stream.encode())
  return path
