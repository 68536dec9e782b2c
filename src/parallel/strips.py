"""The layout of image batches: examples over the axes of the batch, height over `space`, width over `columns`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

from .mesh import STRIPS, MeshError
from .rules import batch_sharding
from .space import Strip, strip

Strips = dict[int, Strip]
"""Maps axes of an array, by number, to the `Strip`s in which they are divided."""


def image_strips(mesh: Mesh, shape: Sequence[int]) -> Strips:
  """Returns the strips of a batch of images or clips; there are none on a mesh without `space` and `columns`.

  Args:
    mesh: the mesh.
    shape: the shape of the batch: (b, h, w, c) for images, (b, t, h, w, c) for clips.

  Returns:
    The axis of the height, of the width, or both -> its strips.

  Raises:
    MeshError: the mesh has such an axis, but the batch has no images, or they have fewer rows than there are devices.
  """
  strips: Strips = {}
  for axis, dim in zip(STRIPS, (len(shape) - 3, len(shape) - 2), strict=True):
    if mesh.shape.get(axis, 1) == 1:
      continue
    if len(shape) < 4:
      raise MeshError(f'axis {axis!r} divides images; examples of shape {tuple(shape[1:])} are none: leave it out')
    if shape[dim] < mesh.shape[axis]:
      raise MeshError(
        f'{axis}={mesh.shape[axis]}: images of {tuple(shape[-3:-1])} have fewer rows than that; make it smaller'
      )
    strips[dim] = strip(mesh, axis, shape[dim])
  return strips


def layer_strips(shardings: Any, shapes: Any, mesh: Mesh) -> Any:
  """Returns the strips of parameters whose layers are sharded over `pipe`, as `partition` takes them.

  Args:
    shardings: the shardings of the parameters.
    shapes: the shapes of the parameters, a tree of arrays or ShapeDtypeStructs.
    mesh: the mesh.

  Returns:
    A tree like the parameters: {0: strips of its layers} for those that are sharded over `pipe`, None for others. On a
    mesh without that axis, one None.

  Raises:
    MeshError: no parameter has layers that divide over it.
  """
  stages = mesh.shape.get('pipe', 1)
  if stages == 1:
    return None

  def one(sharding: NamedSharding, x: Any) -> Strips | None:
    spread = bool(sharding.spec) and sharding.spec[0] == 'pipe'
    return {0: Strip('pipe', stages, x.shape[0])} if spread else None

  by_leaf = jax.tree.map(one, shardings, shapes)
  if not jax.tree.leaves(by_leaf):
    raise MeshError(
      f'pipe={stages} divides the layers of a model that has them in a loop; this one has none that divide: set '
      f'model.stacked=True, and layers to a multiple of {stages}'
    )
  return by_leaf


def image_sharding(mesh: Mesh, batch_size: int, strips: Strips, ndim: int, name: str = 'batch_size') -> NamedSharding:
  """Returns the sharding of images in strips; without strips it is that of `batch_sharding`.

  Args:
    mesh: the mesh.
    batch_size: the number of examples.
    strips: the strips of the images, from `image_strips`.
    ndim: the number of axes of the batch.
    name: the name of the batch size in the error's message.

  Raises:
    MeshError: the batch does not divide.
  """
  lead = batch_sharding(mesh, batch_size, name).spec[0]
  rest = (strips[dim].axis if dim in strips else None for dim in range(1, ndim))
  return NamedSharding(mesh, PartitionSpec(lead, *rest)) if strips else batch_sharding(mesh, batch_size, name)


def padded_shape(shape: Sequence[int], strips: Strips) -> tuple[int, ...]:
  """Returns `shape` with the padding that gives every strip of `strips` the same number of rows."""
  return tuple(strips[dim].shards * strips[dim].rows if dim in strips else n for dim, n in enumerate(shape))


def local_rows(sharding: NamedSharding, shape: Sequence[int], strips: Strips) -> dict[int, Int[np.ndarray, ' rows']]:
  """Returns, by axis, which image rows this process's devices hold, in order; -1 stands for padding.

  Args:
    sharding: the sharding of the images, from `image_sharding`.
    shape: the shape of the batch without padding.
    strips: the strips of the images, from `image_strips`.

  Raises:
    MeshError: the devices of this process need rows that are not in one run.
  """
  slices = sharding.addressable_devices_indices_map(padded_shape(shape, strips)).values()
  whole = lambda s, n: (s.start or 0, n if s.stop is None else s.stop)  # noqa: E731
  padded = {}
  for dim, axis_strips in strips.items():
    runs = {whole(index[dim], axis_strips.shards * axis_strips.rows) for index in slices}
    low, high = min(a for a, _ in runs), max(b for _, b in runs)
    if sum(b - a for a, b in runs) != high - low:
      raise MeshError(
        f'mesh {dict(sharding.mesh.shape)}: a process needs rows from several places; write {axis_strips.axis} last'
      )
    padded[dim] = axis_strips.places[low:high]
  return padded


def cut(image: Shaped[np.ndarray, '...'], rows: dict[int, Int[np.ndarray, ' rows']]) -> Shaped[np.ndarray, '...']:
  """Returns the given rows of images, with zeros for row numbers that they do not have.

  Args:
    image: an array of images.
    rows: the rows to take, by axis of the array, as `local_rows` returns them; -1 stands for padding. Axes that are not
      named are kept whole.
  """
  for dim, wanted in rows.items():
    there = (wanted >= 0) & (wanted < image.shape[dim])
    image = np.take(image, np.where(there, wanted, 0), axis=dim)
    image[(slice(None),) * dim + (~there,)] = 0
  return image
