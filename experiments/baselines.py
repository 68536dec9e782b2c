"""Detectors without anything learned, beside which networks are measured: (t, h, w) grey frames -> a score for each frame.

A frame's score depends on it and on those before it alone; of the first frame it is 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

SMOOTH, WINDOW, STRIDE = 1.5, 24, 4  # pixels
BEARING = 0.15  # pixels a frame to either side, at most
EDGE = 3  # rows of windows at the top and at the bottom that are not looked at: sky, and road that always grows
RIDGE = 2000.0  # of squared gradients summed over a window: less texture than that tells nothing

Frames = UInt8[np.ndarray, 't h w']


def frame_difference(frames: Frames) -> Float[np.ndarray, ' t']:
  """The mean absolute change of brightness from the frame before."""
  change = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean((1, 2))
  return np.concatenate([[0.0], change])


def expansion(frames: Frames) -> Float[np.ndarray, ' t']:
  """How fast the fastest part of the picture grows, per frame, among those that stay where they are in it.

  Growth is the inverse of the time to contact; what is going to pass moves to a side, what hits keeps its bearing.

  In every window, brightness constancy gives for translation (a, b) and expansion d the least squares
  min sum (E_x (a + d x) + E_y (b + d y) + E_t)^2 (Horn, Fang and Masaki 2007, case III, without rotation of the object);
  the mean of three frames, to be less nervous. Its constants are the best of some on the training scenes of `data.dashcam`.
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
  size = WINDOW / 4  # so that all three unknowns are of one size
  rows = np.stack([ex, ey, growth / size], -1)
  normal = rows.mT @ rows + RIDGE * np.eye(3)
  right = -rows.mT @ et[..., None]
  solved = np.linalg.solve(normal, right)[..., 0]
  solved = np.where(np.abs(solved[..., 0]) < BEARING, solved[..., 2] / size, 0.0)
  columns = len(range(0, frames.shape[2] - WINDOW + 1, STRIDE))
  fastest = solved.reshape(len(solved), -1, columns)[:, EDGE:-EDGE].max((1, 2))
  score = np.concatenate([[0.0], fastest])
  return np.convolve(score, np.ones(3) / 3)[: len(score)]
