"""Draws the pictures of docs/explain: factors, sites, and factors on a mesh.

python scripts/drawings.py --out=docs/explain
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from absl import flags
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

_OUT = flags.DEFINE_string('out', 'docs/explain', 'The folder of the pictures.')

INK, SOFT, BLUE, ORANGE, GREEN = '#1c2024', '#5f6873', '#0072B2', '#E69F00', '#009E73'


def canvas(width: float, height: float) -> tuple[Any, Any]:
  """Returns a figure and axes in which one unit is an inch."""
  figure = plt.figure(figsize=(width, height))
  axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
  axes.axis('off')
  return figure, axes


def box(axes: Any, x: float, y: float, w: float, h: float, words: str, colour: str = SOFT, size: float = 11) -> None:
  """Draws a rounded box with words, from its lower left corner."""
  shape = FancyBboxPatch((x, y), w, h, boxstyle='round,pad=0,rounding_size=0.08', fc=f'{colour}18', ec=colour, lw=1.4)
  axes.add_patch(shape)
  axes.text(x + w / 2, y + h / 2, words, ha='center', va='center', color=INK, fontsize=size)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = SOFT, bend: float = 0) -> None:
  """Draws an arrow."""
  style = f'arc3,rad={bend}'
  axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=13, color=colour, connectionstyle=style))


def note(
  axes: Any, x: float, y: float, words: str, colour: str = SOFT, size: float = 10, align: str = 'center'
) -> None:
  """Writes words."""
  axes.text(x, y, words, ha=align, va='center', color=colour, fontsize=size)


def factors() -> Any:
  """Draws a layer with what goes in and comes out, and the two factors."""
  figure, axes = canvas(9, 4.2)
  box(axes, 3.4, 2.6, 2.2, 1.0, 'layer  y = x W\nW: 2 x 2', size=12)
  box(axes, 0.3, 2.75, 2.0, 0.7, 'inputs  x\n(1, 2), (1, 0)', BLUE)
  box(axes, 6.7, 2.75, 2.0, 0.7, 'loss', SOFT)
  arrow(axes, (2.3, 3.1), (3.4, 3.1), BLUE)
  arrow(axes, (5.6, 3.25), (6.7, 3.25))
  arrow(axes, (6.7, 2.95), (5.6, 2.95), ORANGE)
  note(axes, 6.15, 3.5, 'y')
  note(axes, 6.15, 2.7, 'g', ORANGE)
  box(axes, 0.3, 0.6, 3.1, 1.1, 'A: mean of  xᵀ x\n[ 1  1 ]\n[ 1  2 ]', BLUE, 12)
  box(axes, 5.6, 0.6, 3.1, 1.1, 'G: mean of  gᵀ g\n[ 1  0 ]\n[ 0  1 ]', ORANGE, 12)
  arrow(axes, (1.3, 2.75), (1.6, 1.7), BLUE)
  arrow(axes, (6.15, 2.6), (6.8, 1.7), ORANGE)
  note(axes, 4.5, 1.15, 'curvature\n≈ A ⊗ G', INK, 12)
  note(axes, 4.5, 0.25, 'step:  ΔW = -A⁻¹ ∇L G⁻¹', INK, 12)
  return figure


def sites() -> Any:
  """Draws a network as operations in a row; the sites are coloured."""
  figure, axes = canvas(9, 3.6)
  operations = (('x @ w1', BLUE), ('+ b1', BLUE), ('tanh', SOFT), ('h @ w2', BLUE), ('loss', SOFT))
  for i, (words, colour) in enumerate(operations):
    x = 1.2 + 1.55 * i
    box(axes, x, 1.5, 1.1, 0.6, words, colour, 12)
    arrow(axes, (x - 0.45, 1.8), (x, 1.8))
  note(axes, 0.5, 1.8, 'batch', INK, 12)
  for i, name in ((0, 'w1'), (1, 'b1'), (3, 'w2')):
    x = 1.75 + 1.55 * i
    box(axes, x - 0.35, 2.75, 0.7, 0.5, name, GREEN, 12)
    arrow(axes, (x, 2.75), (x, 2.1), GREEN)
    box(axes, x - 0.45, 0.3, 0.9, 0.5, 'probe 0', ORANGE)
    arrow(axes, (x, 0.8), (x, 1.5), ORANGE)
  note(axes, 4.85, 0.55, 'no parameter:\nno site', SOFT)
  note(axes, 8.2, 3.0, 'parameters', GREEN, 11)
  note(axes, 8.2, 1.15, 'sites are blue', BLUE, 11)
  return figure


def on_a_mesh() -> Any:
  """Draws four devices: what each computes, what travels to the owners and back."""
  figure, axes = canvas(9, 4.8)
  owned = ('A of layer 1', 'G of layer 1', 'A of layer 2', 'G of layer 2')
  for i, name in enumerate(owned):
    x = 0.3 + 2.15 * i
    note(axes, x + 0.95, 4.55, f'device {i}', INK, 12)
    box(axes, x, 3.6, 1.9, 0.65, 'sums over its\nown examples', BLUE)
    box(axes, x, 1.9, 1.9, 0.65, f'owns {name}:\naverages, inverts', ORANGE)
    box(axes, x, 0.25, 1.9, 0.65, 'all inverses,\nits update', GREEN)
    for j in range(4):
      other = 0.3 + 2.15 * j + 0.95
      axes.plot([x + 0.95, other], [3.6, 2.58], color=BLUE, lw=1.6 if i == j else 0.7, alpha=1 if i == j else 0.45)
      axes.plot([x + 0.95, other], [1.9, 0.93], color=GREEN, lw=1.6 if i == j else 0.7, alpha=1 if i == j else 0.45)
  bold = {
    'ha': 'center',
    'va': 'center',
    'fontsize': 10.5,
    'color': INK,
    'bbox': {'fc': 'white', 'ec': 'none', 'pad': 2},
  }
  axes.text(4.5, 3.08, 'sums are added up at the owner: one triangle of each factor travels', **bold)
  axes.text(4.5, 1.4, 'inverses go to all', **bold)
  return figure


def packages() -> Any:
  """Draws the packages; each imports only from those below it to which an arrow points."""
  figure, axes = canvas(9, 4.9)
  boxes = {
    'program': (0.4, 0.2, 2.6, 'program\nreads JAX programs'),
    'files': (6.4, 0.2, 2.2, 'files\nwhole, synced files'),
    'kron': (0.2, 1.4, 2.0, 'kron\ncurvature, optimisers'),
    'parallel': (2.4, 1.4, 2.0, 'parallel\nmeshes, strips'),
    'edge': (3.6, 0.2, 2.2, 'edge\nternary networks'),
    'models': (4.6, 1.4, 1.8, 'models\nflax modules'),
    'data': (6.6, 1.4, 2.0, 'data\nsets, films, graphs'),
    'train': (3.3, 2.6, 2.4, 'train\nthe trainer'),
    'tasks': (6.2, 3.5, 2.2, 'tasks\nwhat is trained'),
    'commands': (2.3, 3.5, 2.6, 'commands\nkronmesh train, plan, ...'),
    'experiments': (2.3, 4.3, 2.6, 'experiments, scripts'),
  }
  colours = {
    'kron': BLUE,
    'parallel': BLUE,
    'program': BLUE,
    'models': GREEN,
    'edge': GREEN,
    'data': GREEN,
    'files': GREEN,
  }
  height = 0.55
  for name, (x, y, w, words) in boxes.items():
    box(axes, x, y, w, height, words, colours.get(name, ORANGE), 10)
  pairs = (
    'kron program, parallel program, models program, data files, train kron, train parallel, train models, train data'
  )
  upwards = 'models edge, edge files, tasks train, commands train, commands tasks, experiments commands'
  for pair in f'{pairs}, {upwards}'.split(', '):
    upper, lower = (boxes[name] for name in pair.split())
    if upper[1] == lower[1]:
      arrow(axes, (upper[0] + upper[2], upper[1] + height / 2), (lower[0], lower[1] + height / 2))
      continue
    lean = 0.35 * (lower[0] + lower[2] / 2 - upper[0] - upper[2] / 2)
    lean = max(-0.4 * upper[2], min(0.4 * upper[2], lean))
    back = max(-0.4 * lower[2], min(0.4 * lower[2], -lean))
    arrow(axes, (upper[0] + upper[2] / 2 + lean, upper[1]), (lower[0] + lower[2] / 2 + back, lower[1] + height))
  return figure


def main() -> None:
  """Writes the pictures."""
  plt.rcParams.update({'font.family': 'DejaVu Sans', 'svg.fonttype': 'path', 'svg.hashsalt': 'kronmesh'})
  for draw in (factors, sites, on_a_mesh, packages):
    figure = draw()
    path = Path(_OUT.value) / f'{draw.__name__}.svg'
    figure.savefig(path, facecolor='white', metadata={'Date': None})
    plt.close(figure)


if __name__ == '__main__':
  launch.command(main, 'python scripts/drawings.py --out=docs/explain')
