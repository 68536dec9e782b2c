"""Sharding tables: they say along which mesh axis each logical axis of a model family runs.

Models only name logical axes (flax's logical partitioning). These tables are the only place where the names meet a
mesh. An axis that is absent from a mesh is simply not used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..extras import load
from .mesh import BATCH, MeshError, batch_axes, batch_shards
from .placement import Placement, Stacked

_LOG = logging.getLogger('kronmesh')

Rules = Mapping[str, str | None]
"""Maps each logical axis of a family of models to the mesh axis along which it runs, or to None if it stays whole.

A mesh axis that a mesh does not have is not used.
"""

RULES: dict[str, Rules] = {
  'gan': {'in': 'fsdp', 'mid': 'model'},
  # The nodes of a graph lie as the batch does, and there is little else to shard.
  'link_predictor': {'nodes': None, 'in': None, 'width': 'model'},
  'mlp': {'in': 'fsdp', 'hidden': 'model', 'out': None},
  'autoencoder': {'even': 'fsdp', 'odd': 'model', 'pixels': None},
  'convnet': {'window': None, 'in': 'fsdp', 'mid': 'model', 'classes': None},
  'r2plus1d': {'in': 'fsdp', 'mid': 'model', 'out': None, 'classes': None},
  'resnet': {'window': None, 'in': 'fsdp', 'mid': 'model', 'out': None, 'classes': None},
  'ternary': {'window': None, 'in': 'fsdp', 'mid': 'model', 'classes': None},
  'transformer': {'layers': 'pipe', 'width': 'fsdp', 'hidden': 'model'},
  'video_transformer': {'layers': 'pipe', 'width': 'fsdp', 'hidden': 'model'},
  'directed_video': {'nodes': None, 'in': 'fsdp', 'mid': 'model', 'width': None, 'classes': None},
  'zero_shot': {'nodes': None, 'window': None, 'in': 'fsdp', 'mid': 'model', 'width': None, 'classes': None},
  'vit': {'layers': 'pipe', 'window': None, 'width': 'fsdp', 'hidden': 'model'},
}
"""Holds the `Rules` of each family of models, by the name of the model in a config.

In a deep network, layers are split along `model` by columns and by rows in turn: one all-reduce for a pair. The other
side of a kernel lies along `fsdp`, whose shards are gathered where they are used. Both axes are optional.
"""


@contextlib.contextmanager
def logical_axes(rules: Rules, mesh: Mesh) -> Iterator[None]:
  """Shards the activations of a model that is traced in this context.

  The logical axis 'batch' is sharded over the mesh axes of the batch, and the others by the rules. No rule shards an
  activation over `fsdp`, because in activations that mesh axis belongs to the batch.

  Args:
    rules: the rules of the model, a row of `RULES`.
    mesh: the mesh.

  Returns:
    A context manager, for a `with` statement around the call of the model.
  """
  known = [(name, axis) for name, axis in rules.items() if axis in mesh.shape and axis not in BATCH]
  linen = load('train', 'flax.linen')  # here, so that the package itself does without flax
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    linen.logical_axis_rules((('batch', batch_axes(mesh)), *known)),
  ):
    yield


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device of `mesh` holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_size: int, name: str = 'batch_size') -> NamedSharding:
  """Returns the sharding of a leading axis over `data` (and `fsdp`, where the mesh has it).

  Args:
    mesh: the mesh.
    batch_size: the length of the axis, in examples.
    name: the name of the batch size in the error's message.

  Raises:
    MeshError: the batch does not divide.
  """
  axes, shards = batch_axes(mesh), batch_shards(mesh)
  if batch_size % shards:
    raise MeshError(f'{name}={batch_size} does not divide by the {shards} shards of {" x ".join(axes)}; change one')
  return NamedSharding(mesh, PartitionSpec(axes))


def local_part(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
  """Returns (index, count), which tell the rows of a batch that this process needs.

  The rows are divided into `count` equal runs, and the devices of this process need run number `index`. Processes that
  differ only along `model` need the same rows.

  Args:
    sharding: the sharding of the batch's leading axis, from `batch_sharding`.
    batch_size: the length of that axis, in examples.

  Raises:
    MeshError: the devices need rows that are not in one run.
  """
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  runs = {(s.start or 0, batch_size if s.stop is None else s.stop) for (s,) in slices}
  low, high = min(start for start, _ in runs), max(stop for _, stop in runs)
  covered = sum(stop - start for start, stop in runs)
  if covered != high - low or batch_size % covered or low % covered:
    raise MeshError(f'mesh {dict(sharding.mesh.shape)}: a process needs rows from several places; write data first')
  return low // covered, batch_size // covered


def param_shardings(params: Any, logical_axes: Any, rules: Rules, mesh: Mesh) -> Any:
  """Returns the shardings of a parameter tree, one NamedSharding for each parameter.

  An axis whose length does not divide by the size of its mesh axis stays whole, with a warning.

  Args:
    params: arrays or ShapeDtypeStructs.
    logical_axes: a tree of the same structure with a PartitionSpec of logical names, or None, at each leaf.
    rules: a row of `RULES`.
    mesh: the mesh.

  Raises:
    MeshError: a logical axis has no rule.
  """

  def one(path, leaf, names):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    spec: list[str | None] = []
    for size, name in zip(leaf.shape, tuple(names or (None,) * leaf.ndim), strict=True):
      if name is not None and name not in rules:
        raise MeshError(f'{where}: logical axis {name!r} has no rule; the table knows {", ".join(rules)}')
      axis = rules[name] if name is not None else None
      if axis in mesh.shape and size % mesh.shape[axis]:
        _LOG.warning('%s: axis of length %d does not divide by %s=%d: replicated', where, size, axis, mesh.shape[axis])
        axis = None
      spec.append(axis if axis in mesh.shape and axis not in spec else None)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(one, params, logical_axes)


def shard_blocks(shardings: Any, axis: str = 'model') -> dict[str, dict[str, int]]:
  """Returns the argument `blocks=` of `kron.curvature` for kernels that are sharded over a mesh axis.

  A factor gets as many blocks as its kernel has shards. G is divided if the last axis (columns) is sharded over the
  mesh axis, A if another axis (rows) is. Parameters with one axis get no blocks.

  Args:
    shardings: the shardings of the parameters, from `param_shardings`.
    axis: the name of the mesh axis.

  Returns:
    The parameter's name -> {'A' or 'G': the number of blocks}, for the parameters that are sharded over the axis.
  """
  sizes: dict[str, dict[str, int]] = {}
  for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]:
    *rows, columns = sharding.spec or (None,)
    size = sharding.mesh.shape.get(axis, 1)
    side = 'G' if columns == axis else 'A' if axis in rows else None
    if side and size > 1 and rows:
      sizes[jax.tree_util.keystr(path, simple=True, separator='/')] = {side: size}
  return sizes


def state_shardings(state: Any, shardings: Any, mesh: Mesh, placement: Placement | None = None) -> Any:
  """Returns the shardings of an optimiser state: leaves that mirror a parameter follow it, the rest is replicated.

  Args:
    state: arrays or ShapeDtypeStructs, from `jax.eval_shape(tx.init, params)`.
    shardings: those of the parameters; a leaf mirrors a parameter if its path ends in the parameter's path.
    mesh: the mesh.
    placement: the placement of K-FAC's stacks (`kron.Stacked`), if there are any; with None they are replicated.

  Returns:
    A tree like the state, with a NamedSharding for each array.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(shardings)
  by_path = {tuple(map(str, path)): sharding for path, sharding in flat}

  def one(path, leaf):
    if isinstance(leaf, Stacked):
      whole = lambda _: replicated(mesh)  # noqa: E731
      return jax.tree.map(whole, leaf) if placement is None else placement.shardings(leaf)
    keys = tuple(map(str, path))
    for i in range(len(keys)):
      mirrored = by_path.get(keys[i:])
      if mirrored is not None and len(mirrored.spec) <= leaf.ndim:
        return mirrored
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, Stacked))
