"""Finds a curvature's parameters in the tree that an optimiser hands over, whatever containers it is made of.

An update must never accept a tree in which it knows no parameter: K-FAC would then silently become plain gradient
descent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .errors import CurvatureError

_WRAPPERS = ('value', 'raw_value')  # keys that flax.nnx puts between a parameter's name and its array


class Parameters(NamedTuple):
  """The parameters of a curvature: their names in the order of jax.tree.leaves, and their shapes."""

  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]

  @classmethod
  def of(cls, params: Any) -> Parameters:
    return cls(tuple(param_names(params)), tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params)))

  @property
  def sizes(self) -> dict[str, int]:
    """Returns the number of entries of each parameter, by name."""
    return {name: math.prod(shape) for name, shape in zip(self.names, self.shapes, strict=True)}


def check_arrays(params: Any, args: tuple) -> None:
  """Raises CurvatureError if a leaf of the parameters, or of the loss's other arguments, is not an array or a number."""
  for tree, what in ((params, 'the parameters hold'), (args, 'the arguments of the loss hold')):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if not (hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')) and not isinstance(leaf, bool | int | float | complex):
        where = jax.tree_util.keystr(path)
        raise CurvatureError(
          f'{what} {where}: {type(leaf).__name__}, which is not an array; pass arrays alone '
          '(eqx.partition(model, eqx.is_inexact_array) in equinox, nnx.split in flax)'
        )


class Matched(NamedTuple):
  """The leaves of a tree, under the names that the curvature has for them.

  leaves: arrays by name, without the parameters that the tree masks.
  treedef, order: the structure and the order of leaves from which the tree is rebuilt.
  flat: whether the tree is one vector of all parameters, as `optax.flatten` makes it.
  """

  leaves: dict[str, Array]
  treedef: Any
  order: tuple[str, ...]
  flat: Any = None

  def rebuilt(self, leaves: Mapping[str, Array]) -> Any:
    """Builds the tree from these leaves."""
    if self.flat is not None:
      vector = jnp.concatenate([leaves[name].reshape(-1) for name in self.order])
      return jax.tree.unflatten(self.treedef, [vector.astype(self.flat.dtype)])
    return jax.tree.unflatten(self.treedef, [leaves[name] for name in self.order])

  def named(self, tree: Any) -> dict[str, Array]:
    """Returns the leaves of another tree of the same structure, by name."""
    if self.flat is None:
      return dict(zip(self.order, jax.tree.leaves(tree), strict=True))
    (vector,) = jax.tree.leaves(tree)
    return _cut(vector, {name: x.shape for name, x in self.leaves.items()})


def param_names(params: Any) -> list[str]:
  """Returns the path of each leaf of a tree, such as 'path/to/kernel', in the order of jax.tree.leaves.

  These are the names that `curvature` gives to the parameters `params`, a pytree.
  """
  return _names([path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]])


def match(tree: Any, parameters: Parameters) -> Matched:
  """Finds the parameters in a tree of their gradients, or of anything else shaped like them.

  It recognises the same parameters in another container (nnx State or its pure dict, FrozenDict, dataclass, equinox
  module), under another root, or joined into one vector by optax.flatten. Parameters under optax.masked or
  optax.partition are left to other transformations.

  Raises:
    CurvatureError: a parameter is missing without being masked, or a leaf is not a parameter of the curvature.
  """
  is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
  leaves, treedef = jax.tree.flatten(tree)
  if _is_flat(leaves, parameters):
    leaf_by_name = _cut(leaves[0], dict(zip(parameters.names, parameters.shapes, strict=True)))
    return Matched(leaf_by_name, treedef, parameters.names, leaves[0])
  names = _names([path for path, _ in paths])
  shapes = [None if is_masked(x) else jnp.shape(x) for _, x in paths]
  names, shapes = _translated(names, shapes, parameters)
  _check(names, shapes, dict(zip(parameters.names, parameters.shapes, strict=True)))
  order = tuple(name for name, shape in zip(names, shapes, strict=True) if shape is not None)
  return Matched(dict(zip(order, leaves, strict=True)), treedef, order)


def _names(paths: list) -> list[str]:
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path in paths]


def _is_flat(leaves: list, parameters: Parameters) -> bool:
  total = (sum(parameters.sizes.values()),)
  return len(leaves) == 1 and jnp.shape(leaves[0]) == total and parameters.shapes != (total,)


def _cut(vector: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
  """Cuts a vector into arrays of these shapes."""
  result, start = {}, 0
  for name, shape in shapes.items():
    size = math.prod(shape)
    result[name] = jax.lax.slice_in_dim(vector, start, start + size).reshape(shape)
    start += size
  return result


Shapes = list[tuple[int, ...] | None]  # None where a parameter is masked


def _translated(names: list[str], shapes: Shapes, parameters: Parameters) -> tuple[list[str], Shapes]:
  """Returns the curvature's names for a tree's leaves, with their shapes; keeps the tree's names if nothing fits."""
  exact = _without_prefixes(names, shapes, parameters.names)
  if set(exact[0]) <= set(parameters.names):
    return exact
  # Compare the paths without wrappers and without the root that all of them share.
  theirs = _plain(parameters.names)
  bare, own_shapes = _without_prefixes(_plain(names), shapes, theirs)
  if len(set(bare)) == len(bare) and len(set(theirs)) == len(theirs) and set(bare) == set(theirs):
    back = dict(zip(theirs, parameters.names, strict=True))
    return [back[name] for name in bare], own_shapes
  # If the names do not match, the order of leaves is reliable only where no two parameters have the same shape.
  if shapes == list(parameters.shapes) and len(set(shapes)) == len(shapes):
    return list(parameters.names), shapes
  return names, shapes


def _without_prefixes(names: list[str], shapes: Shapes, known: Sequence[str]) -> tuple[list[str], Shapes]:
  """Replaces each masked subtree, which is a single leaf, by the names of the parameters in it."""
  result: list[tuple[str, tuple[int, ...] | None]] = []
  for name, shape in zip(names, shapes, strict=True):
    inside = [k for k in known if k.startswith(f'{name}/')] if shape is None else []
    result += [(k, None) for k in inside] or [(name, shape)]
  return [name for name, _ in result], [shape for _, shape in result]


def _plain(names: Any) -> list[str]:
  """Strips from paths the containers that wrap single arrays and the root that all of them share."""
  parts = [[p for p in name.split('/') if p] for name in names]
  parts = [p[:-1] if len(p) > 1 and p[-1] in _WRAPPERS else p for p in parts]
  roots = [p[:-1] for p in parts]
  same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*roots, strict=False))
  shared = len(list(same))
  return ['/'.join(p[shared:]) for p in parts]


def _check(names: list[str], shapes: Shapes, known: Mapping[str, tuple[int, ...]]) -> None:
  stranger = next((name for name in names if name not in known), None)
  if stranger is not None:
    raise CurvatureError(
      f'the update has {stranger!r}, which is not a parameter of the curvature (it has {_some(known)}); give update and '
      'kron.curvature the same parameters, or leave others to optax.partition'
    )
  missing = next((name for name in known if name not in names), None)
  if missing is not None:
    raise CurvatureError(
      f'the update lacks {missing!r}, a parameter of the curvature (it has {_some(names)}); give all gradients, or hide '
      'parameters by optax.masked or optax.partition'
    )
  for name, shape in zip(names, shapes, strict=True):
    if shape is not None and shape != known[name]:
      raise CurvatureError(f'{name!r} has shape {shape} in the update and {known[name]} in the curvature')


def _some(names: Any) -> str:
  names = list(names)
  return ', '.join(names[:4]) + (' ...' if len(names) > 4 else '')
