"""What a design costs and how fast it is: by layer, and for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .layers import Network
from .synthesise import Cells, Placed
from .verilog.top import Design


class Row(NamedTuple):
  """A layer of a design. cycles: it is busy for so many with each image. cells: None before synthesis."""

  name: str
  style: str
  weights: int
  nonzero: int
  cycles: int
  cells: Cells | None


class Speed(NamedTuple):
  """How fast a design is. cycles: between two images. images: in a second, at the routed clock."""

  cycles: int
  megahertz: float
  images: float


def rows(network: Network, design: Design, cells: Mapping[str, Cells] | None = None) -> list[Row]:
  """Returns the rows of a design's layers and head."""
  names = [*(f'layer_{i}' for i in range(len(network.layers))), 'head']
  kernels = [n.weights for n in network.layers] + [network.head.weights]
  return [
    Row(name, style, kernel.size, int(np.count_nonzero(kernel)), busy(network, design, i), cells and cells[name])
    for i, (name, style, kernel) in enumerate(zip(names, design.styles, kernels, strict=True))
  ]


def busy(network: Network, design: Design, layer: int) -> int:
  """Returns how many cycles a layer, or the head after the last one, takes for an image.

  A pixel, and each zero beside the image, takes one cycle, or as many as it has bits.
  """
  stream, convs = design.streams[layer], network.plan.convs
  around, beats = 0, stream.bits if design.styles[layer] == 'serial' else 1
  if layer < len(convs):
    conv = convs[layer]
    around = conv.kernel // 2
    if design.styles[layer] == 'serial':
      beats = max(beats, conv.bits + (conv.add is not None))
  return beats * (stream.rows + around) * (stream.columns + around)


def speed(network: Network, design: Design, placed: Placed) -> Speed:
  """Returns how fast a placed design is: its slowest layer sets the pace."""
  cycles = max(busy(network, design, i) for i in range(len(design.styles)))
  return Speed(cycles, placed.megahertz, placed.megahertz * 1e6 / cycles)
