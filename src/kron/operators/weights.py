"""Values made of parameters' entries, which record a weight's casts, reshapes, slices, concatenations and scalings.

`kron` names dimensions as follows: s slots (independent matrices of one parameter), i and o the rows and columns of a
kernel's matrix, b examples, r further uses within an example, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array


class Step(NamedTuple):
  """One rearrangement: 'transpose', 'reshape', or any other, with its name and a hashable description."""

  name: str
  args: Any
  apply: Callable[..., Array]


class Arrangement(NamedTuple):
  """A way to lay out parameters as one array of `shape`, in which no entry appears twice.

  Two arrangements with equal `key`s are the same: they apply the same steps to the same parameters.
  """

  params: tuple[int, ...]
  key: tuple
  apply: Callable[..., Array]
  shape: tuple[int, ...]

  def back(self, shapes: Sequence[tuple[int, ...]], x: Array) -> list[Array]:
    """Applies the transpose, from an array to parameters of these shapes; entries not in the array are zero."""
    structs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
    return list(jax.linear_transpose(lambda *p: self.apply(*p), *structs)(x))


class Weight(NamedTuple):
  """A value whose every entry is one entry of a parameter, up to a coefficient and possibly a constant.

  `parts` (joined) and then `steps` lay the parameters out as an array of shape `stack + core`. `stack` holds the
  lengths of the loops that slice this array, with one index for each iteration. The axes of `core` are the axes `axes`
  of the value, in increasing order. The value repeats along its other axes.

  scale: the coefficient, if it is a number.
  chained: whether the coefficient is an array, made by the operations in `Survey.chains`.
  varies: the axes along which that array varies.
  met: the parameters of computed values that took part in the value.
  gains: other weights that multiplied this one.
  meeting: the last operation in which the value met data entry by entry, named by its output.
  spread: whether the value was repeated since then.
  unique: whether no entry appears twice.
  levels: the depths of nested loops at which it was sliced.
  bent: whether its entries went through a nonlinear function, or were shifted by a value made from the parameter
    itself. They are then not proportional to the parameter's entries.
  """

  params: tuple[int, ...]
  parts: tuple[Weight, ...]
  steps: tuple[Step, ...]
  stack: tuple[int, ...]
  core: tuple[int, ...]
  axes: tuple[int, ...]
  scale: float = 1.0
  chained: bool = False
  varies: frozenset[int] = frozenset()
  met: frozenset[int] = frozenset()
  gains: tuple[Weight, ...] = ()
  meeting: int | None = None
  spread: bool = False
  unique: bool = True
  levels: tuple[int, ...] = ()
  bent: bool = False

  @classmethod
  def of(cls, param: int, shape: tuple[int, ...]) -> Weight:
    return cls((param,), (), (), (), tuple(shape), tuple(range(len(shape))))

  # --- layout

  def _then(self, name: str, args: Any, apply: Callable, core: tuple[int, ...]) -> Weight:
    """Appends a step on the core, and drops steps that undo each other, so that equal layouts have equal keys."""
    depth, steps = len(self.stack), self.steps
    if name == 'transpose':
      perm = tuple(range(depth)) + tuple(depth + p for p in args)
      if steps and steps[-1].name == 'transpose':
        perm, steps = tuple(steps[-1].args[p] for p in perm), steps[:-1]
      if perm != tuple(range(len(perm))):
        steps = (*steps, Step(name, perm, lambda x: x.transpose(perm)))
    elif name == 'reshape':
      shape = (*self.stack, *args)
      if shape != (*self.stack, *self.core):
        if steps and steps[-1].name == 'reshape':
          steps = steps[:-1]
        steps = (*steps, Step(name, shape, lambda x: x.reshape(shape)))
    else:
      for _ in range(depth):
        apply = jax.vmap(apply)
      steps = (*steps, Step(name, (depth, args), apply))
    return self._replace(steps=steps, core=tuple(core))

  def _apply(self, *params: Array) -> Array:
    if self.parts:
      arrays, rest = [], list(params)
      for part in self.parts:
        arrays.append(part._apply(*rest[: len(part.params)]))
        rest = rest[len(part.params) :]
      value, steps = self.steps[0].apply(*arrays), self.steps[1:]
    else:
      (value,), steps = params, self.steps
    for step in steps:
      value = step.apply(value)
    return value

  def _key(self) -> tuple:
    return tuple(part._key() for part in self.parts), tuple((step.name, step.args) for step in self.steps), self.params

  def arranged(self, shape: tuple[int, ...], *groups: tuple[int, ...]) -> Arrangement:
    """Arranges the parameters as `shape`, one axis for each group of this value's axes, with their loops in front."""
    kept = [self.axes.index(a) for group in groups for a in group if a in self.axes]
    kept += [k for k in range(len(self.axes)) if k not in kept]  # axes of length one
    w = self._then('transpose', tuple(kept), lambda x: x, tuple(self.core[k] for k in kept))
    loops = math.prod(self.stack)
    full = (loops * shape[0], *shape[1:])
    w = w._replace(stack=(), core=(*self.stack, *w.core))._then('reshape', full, lambda x: x, full)
    return Arrangement(self.params, (self.stack, *w._key()), w._apply, full)

  # --- operations that move it

  def transposed(self, perm: tuple[int, ...]) -> Weight:
    order = tuple(self.axes.index(a) for a in perm if a in self.axes)
    w = self._then('transpose', order, lambda x: x, tuple(self.core[k] for k in order))
    return w._replace(
      axes=tuple(j for j, a in enumerate(perm) if a in self.axes),
      varies=frozenset(j for j, a in enumerate(perm) if a in self.varies),
      gains=tuple(g.transposed(perm) for g in self.gains),
    )

  def broadcast(self, old: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...]) -> Weight:
    """Returns the weight after lax.broadcast_in_dim of a value of shape `old`."""
    spread = self.spread or (self.meeting is not None and math.prod(shape) > math.prod(old))
    kept = [k for k, a in enumerate(self.axes) if old[a] == shape[axes[a]]]
    core = tuple(self.core[k] for k in kept)
    w = self._then('reshape', core, lambda x: x, core)
    return w._replace(
      axes=tuple(axes[self.axes[k]] for k in kept),
      varies=frozenset(axes[a] for a in self.varies if old[a] == shape[axes[a]]),
      spread=spread,
      gains=tuple(g.broadcast(old, shape, axes) for g in self.gains),
    )

  def reshaped(self, old: tuple[int, ...], shape: tuple[int, ...]) -> Weight | None:
    """Returns the weight after a reshape, or None if that would merge repeated axes with the parameter's axes."""
    core, axes, varies = [], [], set()
    for before, after in _groups(old, shape):
      long = [a for a in before if old[a] != 1]
      kernel_axes = [a for a in long if a in self.axes]
      if kernel_axes and len(kernel_axes) < len(long):
        return None
      if kernel_axes:
        axes += after
        core += [shape[a] for a in after]
        if self.varies & set(kernel_axes):
          varies |= set(after)
    w = self._then('reshape', tuple(core), lambda x: x, tuple(core))
    gains = tuple(g.reshaped(old, shape) for g in self.gains)
    return None if None in gains else w._replace(axes=tuple(axes), varies=frozenset(varies), gains=gains)

  def picked(self, old: tuple[int, ...], new: tuple[int, ...], name: str, args: Any, apply: Callable) -> Weight | None:
    """Returns the weight after an operation on the whole value, such as a slice, that keeps the number of axes."""
    whole = all(a in self.axes for a in range(len(old)))
    if not whole and not (name == 'slice' and all(old[a] == new[a] for a in range(len(old)) if a in self.axes)):
      return None
    if not whole:
      return self
    return self._then(name, args, apply, new)

  def beside_examples(self) -> Weight:
    """Drops a first axis of length one, which belongs to a single example."""
    if 0 not in self.axes or self.core[self.axes.index(0)] != 1:
      return self
    at = self.axes.index(0)
    core = self.core[:at] + self.core[at + 1 :]
    w = self._then('reshape', core, lambda x: x, core)
    return w._replace(axes=self.axes[:at] + self.axes[at + 1 :], varies=self.varies - {0})

  def sliced_by_loop(self, depth: int) -> Weight:
    """Returns one iteration's part of a value that a loop slices along its first axis."""
    rest = self._replace(
      axes=tuple(a - 1 for a in self.axes if a),
      varies=frozenset(a - 1 for a in self.varies if a),
      gains=tuple(g.sliced_by_loop(depth) for g in self.gains),
    )
    if 0 not in self.axes:
      return rest
    return rest._replace(stack=(*self.stack, self.core[0]), core=self.core[1:], levels=(*self.levels, depth))

  def covers(self, shape: tuple[int, ...]) -> bool:
    """Checks whether a value of this shape repeats no entry."""
    return self.unique and all(size == 1 or a in self.axes for a, size in enumerate(shape))


def joined(parts: Sequence[Weight], name: str, args: Any, apply: Callable, core: tuple[int, ...]) -> Weight | None:
  """Concatenates whole weights of different parameters, or returns None if the parts do not fit."""
  params = [p for w in parts for p in w.params]
  first = parts[0]
  fits = all(
    w.stack == first.stack and w.scale == first.scale and not w.chained and w.unique and len(w.axes) == len(w.core)
    for w in parts
  )
  if not fits or len(set(params)) < len(params):
    return None
  for _ in first.stack:
    apply = jax.vmap(apply)
  step = Step(name, (len(first.stack), args), apply)
  axes = tuple(range(len(core)))
  return Weight(tuple(params), tuple(parts), (step,), first.stack, core, axes, first.scale, levels=first.levels)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
  """Returns the smallest runs of axes that a reshape maps onto each other."""
  groups, i, j = [], 0, 0
  while i < len(old) or j < len(new):
    before, after = [], []
    left = right = 1
    while left != right or not (before or after):
      if (left <= right and i < len(old)) or j >= len(new):
        before.append(i)
        left *= old[i]
        i += 1
      else:
        after.append(j)
        right *= new[j]
        j += 1
    groups.append((before, after))
  return groups
