"""Data sets that need no extra files: the text of Python's library, and points of a boundary-value problem."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

TEXT_WINDOW = 65  # a token to start from and 64 to predict
VOCABULARY = 128


def python_text(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns windows of ASCII from Python's standard library, (n, 65) int32, and labels that are all zero.

  Every tenth file, by name, is in the test split. The text differs between versions of Python.
  """
  folder = Path(sysconfig.get_path('stdlib'))
  files = sorted(folder.glob('*.py')) + sorted(folder.glob('[a-z]*/*.py'))
  files = [f for f in files if not {'test', 'tests', 'idlelib', 'site-packages', 'lib2to3'} & set(f.parts)]
  chosen = [f for i, f in enumerate(files) if (i % 10 == 9) == (split == 'test')]
  text = b''.join(f.read_bytes() for f in chosen)
  tokens = np.frombuffer(text, np.uint8)
  tokens = tokens[tokens < VOCABULARY].astype(np.int32)
  n = min(len(tokens) // TEXT_WINDOW, 32768 if split == 'train' else 2048)
  return tokens[: n * TEXT_WINDOW].reshape(n, TEXT_WINDOW), np.zeros(n, np.int32)


def poisson_points(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns points of the unit square, (n, 2), and the values there of u* = sin(pi x) sin(2 pi y).

  u* solves -laplacian(u) = 5 pi^2 u*. Training has 16,384 random points, the test a grid of 32 x 32.
  """
  if split == 'train':
    points = np.random.default_rng(0).uniform(size=(16384, 2))
  else:
    axis = (np.arange(32) + 0.5) / 32
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
  values = np.sin(np.pi * points[:, 0]) * np.sin(2 * np.pi * points[:, 1])
  return points.astype(np.float32), values.astype(np.float32)


MADE = {'python_text': python_text, 'poisson': poisson_points}
"""Maps the name of each set that needs no extra files to a function of the split, which returns (inputs, labels).

'python_text' has windows of ASCII from Python's standard library, (n, 65). 'poisson' has points of the unit square,
(n, 2), and the values there of the solution of a boundary-value problem.
"""
