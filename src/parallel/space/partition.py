"""Runs a function on arrays whose images are in strips over a mesh axis (`partition`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ...program import Op, Ref, bind, has_mark, is_known, trace
from ..mesh import MeshError
from .halo import Strip, cleared, packed
from .values import Known, Value, on_device
from .walk import read, run_ops

KEPT = ('attend',)  # jitted functions that have a rule


def strip(mesh: Mesh, axis: str, size: int) -> Strip:
  """Returns the strips of an axis along a mesh axis, as even as possible.

  Args:
    mesh: the mesh.
    axis: the name of the mesh axis.
    size: the length of the axis to divide.

  Raises:
    MeshError: the mesh has no such axis.
  """
  if axis not in mesh.shape:
    raise MeshError(f'mesh {dict(mesh.shape)} has no axis {axis!r}')
  return Strip(axis, mesh.shape[axis], size)


def partition(fn: Callable, mesh: Mesh, strips: Any) -> Callable:
  """Makes `fn` run with its arguments in strips; its results and gradients are those of the whole arrays.

      loss = parallel.partition(loss_fn, mesh, (None, {'inputs': {1: parallel.strip(mesh, 'space', 1080)}, 'label': None}))

  Every operation runs on each device's rows, inside of one `jax.shard_map` over the axes of the strips (others are left
  to the compiler). Devices exchange the other rows that an operation reads, sums over all rows are all-reduced, and
  nothing is gathered. Operations behind an observation mark (`kron.observe`) run outside, on results that lie as the
  strips do. `kron.curvature` reads the result like any other loss; its factors are those of the whole arrays.

  Args:
    fn: a function of pytrees of arrays that can be traced.
    mesh: a mesh with Auto axes.
    strips: a structure like the arguments, with a dict from axes to `Strip`s in place of an array in strips, and None
      in place of others (or of whole trees). Such an array has `shards * rows` rows, and `Strip.places` says which of
      them are padding.

  Returns:
    A function of the same arguments as `fn`, with the same results.

  Raises:
    PartitionError: when the result is called, an operation cannot run without gathering; the message names it, its
      layer and its line.
    MeshError: when the result is called, the length of an array is not that of its strips.
  """

  def run(*args: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    lie = _per_leaf(strips, args)
    shapes = [_true(x, strips) for x, strips in zip(leaves, lie, strict=True)]
    program, results = trace(fn, *jax.tree.unflatten(treedef, shapes), kept=KEPT)
    env: dict[int, Any] = dict(program.consts)
    env.update({v.index: x for v, x in zip(program.inputs, leaves, strict=True)})
    inside = _inside(program.ops)
    wanted = _wanted(
      program.ops[inside:], program.outputs, {v.index for op in program.ops[:inside] for v in op.outputs}
    )
    lying = dict(zip((v.index for v in program.inputs), lie, strict=True))
    lying |= {i: {} for i, c in program.consts.items() if not is_known(c)}  # constants of an enclosing function
    env.update(_in_strips(program.ops[:inside], wanted, env, lying, mesh))
    for op in program.ops[inside:]:
      produced = bind(op, *[read(env, v) for v in op.inputs])
      env.update({v.index: x for v, x in zip(op.outputs, produced, strict=True)})
    return jax.tree.unflatten(jax.tree.structure(results), [read(env, v) for v in program.outputs])

  return run


def _per_leaf(strips: Any, args: Any) -> list[dict[int, Strip]]:
  """Returns the strips along the axes of each array."""
  is_leaf = lambda s: s is None or (isinstance(s, dict) and all(isinstance(k, int) for k in s) and bool(s))  # noqa: E731
  layouts: list[dict[int, Strip]] = []
  jax.tree.map(
    lambda s, tree: layouts.extend([s or {}] * len(jax.tree.leaves(tree))), tuple(strips), tuple(args), is_leaf=is_leaf
  )
  return layouts


def _true(x: Any, strips: dict[int, Strip]) -> jax.ShapeDtypeStruct:
  """Returns the shape of an array without padding."""
  shape = list(np.shape(x))
  for dim, s in strips.items():
    if shape[dim] != s.shards * s.rows:
      raise MeshError(
        f'axis {dim} of an array {tuple(shape)} lies over {s.axis!r}: it must have {s.shards} strips of {s.rows} rows, '
        f'{s.size} of them no padding'
      )
    shape[dim] = s.size
  return jax.ShapeDtypeStruct(tuple(shape), jax.numpy.result_type(x))


def _inside(ops: Sequence[Op]) -> int:
  """Returns the number of operations that run in strips: those before the first observation mark."""
  return next((i for i, op in enumerate(ops) if has_mark(op)), len(ops))


def _wanted(ops: Sequence[Op], outputs: Sequence[Any], made: set[int]) -> list[Ref]:
  """Returns the values made inside that are read outside."""
  inputs = {v.index: v for op in ops for v in op.inputs if isinstance(v, Ref) and v.index in made}
  inputs.update({v.index: v for v in outputs if isinstance(v, Ref) and v.index in made})
  return list(inputs.values())


def _in_strips(
  ops: Sequence[Op], wanted: Sequence[Ref], env: dict[int, Any], lying: dict[int, dict[int, Strip]], mesh: Mesh
) -> dict[int, Any]:
  """Runs the operations inside of a shard_map and returns their wanted results, by index."""
  reads = {v.index: v for op in ops for v in op.inputs if isinstance(v, Ref) and v.index in lying}
  given = list(reads)
  axes = {s.axis for strips in lying.values() for s in strips.values()}
  spec = lambda ndim, strips: PartitionSpec(*(strips[d].axis if d in strips else None for d in range(ndim)))  # noqa: E731
  in_specs = [spec(np.ndim(env[i]), lying[i]) for i in given]
  consts = {i: x for i, x in env.items() if i not in lying}
  results: dict[int, Any] = {}

  def local(xs):
    env = dict(consts)
    for i, x in zip(given, xs, strict=True):
      for d, s in lying[i].items():  # zeros cause no infinities that real rows could not cause
        x = cleared(x, d, s)
      env[i] = Value(x, tuple(lying[i].get(d) for d in range(x.ndim)))
    run_ops(ops, env)
    results.clear()
    results.update(
      {v.index: env[v.index] if isinstance(env[v.index], Known) else on_device(env[v.index]) for v in wanted}
    )
    return [_packed(v) for v in results.values() if isinstance(v, Value)]

  if not axes:
    local([env[i] for i in given])
    return {i: on_device(v).x for i, v in results.items()}
  # A dry run finds how results lie, and whether every operation has a rule.
  lies = _dry(local, in_specs, [env[i] for i in given], mesh, axes, results)
  out_specs = [PartitionSpec(*(s.axis if s else None for s in strips)) for strips in lies]
  arrays = jax.shard_map(local, mesh=_mesh(mesh), in_specs=(in_specs,), out_specs=out_specs, axis_names=axes)(
    [env[i] for i in given]
  )
  values: dict[int, Any] = {}
  outside = iter(zip(arrays, lies, strict=True))
  for i, v in results.items():
    if isinstance(v, Known):
      values[i] = v.traced()
      continue
    x, strips = next(outside)
    for dim, s in enumerate(strips):
      if s is not None and not s.even:
        x = jax.lax.slice_in_dim(x, 0, s.size, axis=dim)
    values[i] = x
  return values


def _packed(value: Value) -> Any:
  """Packs the rows of a result, as it leaves the devices."""
  x = value.x
  for dim, s in value.dims:
    x = packed(x, dim, s)
  return x


def _mesh(mesh: Mesh) -> Any:
  """Returns the mesh to run on; inside of another shard_map it is the mesh in force."""
  current = jax.sharding.get_abstract_mesh()
  return mesh if current.empty or not current.manual_axes else current


def _dry(local, in_specs, arrays, mesh, axes, results) -> list[tuple]:
  lies: list[tuple] = []

  def noted(xs):
    local(xs)
    lies[:] = [v.strips for v in results.values() if isinstance(v, Value)]
    return ()

  jax.eval_shape(jax.shard_map(noted, mesh=_mesh(mesh), in_specs=(in_specs,), out_specs=(), axis_names=axes), arrays)
  return lies
