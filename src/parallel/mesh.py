"""Meshes from strings: `make_mesh('data=4,model=2')`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ('data', 'fsdp', 'model', 'space', 'columns', 'pipe')
BATCH = ('data', 'fsdp')
"""Lists the mesh axes over which the examples of a batch are divided."""
STRIPS = ('space', 'columns')
"""Lists the mesh axes along which images are divided: their height along the first, their width along the second."""


class MeshError(ValueError):
  """Reports a mesh, a batch or a rule that does not fit the devices; its message is one line."""


def parse_mesh(spec: str, n_devices: int) -> dict[str, int]:
  """Returns the size of each axis of a mesh, in the order of the text.

  Args:
    spec: a text such as 'data=-1,model=2', with axes of data, fsdp, model, space, columns and pipe; -1 stands for all
      remaining devices. An empty text is 'data=-1'.
    n_devices: the number of devices, which the product of the sizes must be.

  Raises:
    MeshError: an axis is unknown or repeated, a size is not a number, or the product is not the number of devices.
  """
  sizes: dict[str, int] = {}
  for part in filter(None, (p.strip() for p in spec.split(','))):
    axis, equals, size = (s.strip() for s in part.partition('='))
    if axis not in AXES:
      raise MeshError(f'mesh {spec!r}: axis {axis!r} is unknown; choose from {", ".join(AXES)}')
    if axis in sizes:
      raise MeshError(f'mesh {spec!r}: axis {axis!r} is given twice')
    if not equals or not re.fullmatch('-1|0*[1-9][0-9]*', size):
      raise MeshError(f'mesh {spec!r}: write each axis as name=size, with a positive size or -1; got {part!r}')
    sizes[axis] = int(size)
  sizes = sizes or {'data': -1}
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(open_axes) > 1:
    raise MeshError(f'mesh {spec!r}: only one axis may be -1')
  if open_axes and n_devices % fixed == 0:
    sizes[open_axes[0]] = n_devices // fixed
  if math.prod(sizes.values()) != n_devices:
    wanted = ' x '.join(f'{axis} {size}' for axis, size in sizes.items())
    raise MeshError(
      f'mesh {spec!r}: {wanted} does not match the {n_devices} devices there are; change the mesh or the devices'
    )
  return sizes


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
  """Returns the axes over which a batch is divided: those of `BATCH` that the mesh has, in the order of the mesh."""
  return tuple(axis for axis in mesh.axis_names if axis in BATCH)


def batch_shards(mesh: Mesh) -> int:
  """Returns the number of parts into which a batch is divided on a mesh: the product of the sizes of its `BATCH` axes.

  Args:
    mesh: any mesh; without such axes the number is 1.
  """
  return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def make_mesh(spec: str = 'data=-1', devices: Sequence[jax.Device] | None = None, explicit: bool = False) -> Mesh:
  """Makes a mesh over the devices (all by default).

  Args:
    spec: the axes and their sizes, such as 'data=-1,model=2'; see `parse_mesh`.
    devices: the devices in the order of the mesh, last axis fastest.
    explicit: makes Explicit instead of Auto axes (sharding in types).

  Raises:
    MeshError: an axis is unknown or repeated, a size is not a number, or the product is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = parse_mesh(spec, len(devices))
  kind = AxisType.Explicit if explicit else AxisType.Auto
  return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=(kind,) * len(sizes))
