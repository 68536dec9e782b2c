"""Detectors that do not learn, as baselines for networks: (t, h, w) grey frames -> a score for each frame.

A frame's score depends only on that frame and those before it; the score of the first frame is 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

SMOOTH, WINDOW, STRIDE = 1.5, 24, 4  # pixels
BEARING = 0.15  # at most this many pixels per frame to either side
EDGE = 3  # rows of windows that are skipped at the top (sky) and at the bottom (road, which always grows)
RIDGE = 2000.0  # added to squared gradients summed over a window: texture below this says nothing

Frames = UInt8[np.ndarray, 't h w']


def frame_difference(frames: Frames) -> Float[np.ndarray, ' t']:
  """Returns the mean absolute change of brightness since the previous frame."""
  change = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean((1, 2))
  return np.concatenate([[0.0], change])


def expansion(frames: Frames) -> Float[np.ndarray, ' t']:
  """Returns how fast the picture's fastest part grows, per frame, among the parts that keep their place in it.

  Growth is the inverse of the time to contact. An object that will pass moves to a side; one that will hit keeps its
  bearing.

  In every window, brightness constancy for translation (a, b) and expansion d gives the least squares
  min sum (E_x (a + d x) + E_y (b + d y) + E_t)^2 (Horn, Fang and Masaki 2007, case III, without rotation of the
  object). The score is the mean of three frames, to be steadier. The constants are the best of those tried on the
  training scenes of `data.dashcam`.
  """
  smooth = ndimage.gaussian_filter(frames.astype(np.float32), (0, SMOOTH, SMOOTH))
  before, after = smooth[:-1], smooth[1:]
  middle = (before + after) / 2
  ey, ex = np.gradient(middle, axis=(1, 2))
  et = after - before
  cut = lambda z: np.lib.stride_tricks.sliding_window_view(z, (WINDOW, WINDOW), (1, 2))[:, ::STRIDE, ::STRIDE]  # noqa: E731
  y, x = (np.mgrid[:WINDOW, :WINDOW] - (WINDOW - 1) / 2).astype(np.float32)
  ex, ey, et = (cut(z).reshape(len(et), -1, WINDOW * WINDOW) for z in (ex, ey, et))
  growth = ex * x.ravel() + ey * y.ravel()
  size = WINDOW / 4  # brings all three unknowns to one scale
  rows = np.stack([ex, ey, growth / size], -1)
  normal = rows.mT @ rows + RIDGE * np.eye(3)
  right = -rows.mT @ et[..., None]
  solved = np.linalg.solve(normal, right)[..., 0]
  solved = np.where(np.abs(solved[..., 0]) < BEARING, solved[..., 2] / size, 0.0)
  columns = len(range(0, frames.shape[2] - WINDOW + 1, STRIDE))
  fastest = solved.reshape(len(solved), -1, columns)[:, EDGE:-EDGE].max((1, 2))
  score = np.concatenate([[0.0], fastest])
  return np.convolve(score, np.ones(3) / 3)[: len(score)]
