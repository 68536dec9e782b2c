"""The pictures of a comparison: learning curves, and images with their reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .. import files
from ..train.registry import Entry
from ..train.task import Task
from .palette import colours

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def picture_curves(summaries: list[dict[str, Any]], config: Any, task: Task | Entry, path: Path) -> None:
  """Draws the target's metric over steps and over seconds, with a line for each seed."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained', sharey=True)
  colour_of = colours([s['optimizer'] for s in summaries])
  for s in summaries:
    for j, curve in enumerate(s['curves']):
      steps, seconds, values = np.asarray(curve).T
      for axis, x in zip(axes, (steps, seconds), strict=True):
        axis.plot(
          x,
          values,
          color=colour_of[s['optimizer']],
          alpha=0.85,
          linewidth=1.4,
          label=s['optimizer'] if j == 0 else None,
        )
  for axis, label in zip(axes, ('step', 'seconds of training on this machine'), strict=True):
    axis.axhline(config.target, color='black', linewidth=0.8, linestyle=':')
    axis.set_xlabel(label)
    if task.lower_is_better:
      axis.set_yscale('log')
    else:
      axis.set_ylim(bottom=config.target - 0.15)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(f'evaluation {task.target} (split {config.data.eval_split!r})')
  axes[0].annotate('target', (0, config.target), xytext=(2, 3), textcoords='offset points', fontsize=8)
  axes[0].legend(frameon=False)
  figure.suptitle(f'{config.model.name} on {config.data.name}, batch {config.data.batch_size}, mesh {config.mesh}')
  with files.replacing(path) as file:
    figure.savefig(file, dpi=130)
  plt.close(figure)


def picture_reconstructions(pictures: dict[str, np.ndarray], path: Path) -> None:
  """Draws one row of images for each name."""
  n = len(next(iter(pictures.values())))
  size = (n * 0.8, len(pictures) * 0.85)
  figure, axes = plt.subplots(len(pictures), n, figsize=size, layout='constrained', squeeze=False)
  for row, (name, images) in zip(axes, pictures.items(), strict=True):
    row[0].set_ylabel(name)
    for axis, image in zip(row, images, strict=True):
      axis.imshow(image, cmap='gray_r', vmin=0, vmax=1)
      axis.set_xticks([])
      axis.set_yticks([])
  with files.replacing(path) as file:
    figure.savefig(file, dpi=130)
  plt.close(figure)
