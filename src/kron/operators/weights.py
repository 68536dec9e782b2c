"""Values made of parameters' entries: how a weight looks after casts, reshapes, slices, concatenations and scalings.

Dimension names of `kron`: s slots (independent matrices of one parameter), i and o the rows and columns of a kernel's
matrix, b examples, r further uses within an example, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array


class Step(NamedTuple):
  """One rearrangement: 'transpose', 'reshape', or any other by its name and a hashable description of it."""

  name: str
  args: Any
  apply: Callable[..., Array]


class Arrangement(NamedTuple):
  """A way to lay parameters out as one array of `shape`, in which no entry appears twice.

  Two arrangements with equal `key`s are the same: of the same parameters, by the same steps.
  """

  params: tuple[int, ...]
  key: tuple
  apply: Callable[..., Array]
  shape: tuple[int, ...]

  def back(self, shapes: Sequence[tuple[int, ...]], x: Array) -> list[Array]:
    """The transpose: parameters of these shapes from an array; entries that are not in it are zero."""
    structs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
    return list(jax.linear_transpose(lambda *p: self.apply(*p), *structs)(x))


class Weight(NamedTuple):
  """A value whose every entry is, up to a coefficient and perhaps a constant, one entry of a parameter.

  Laid out by `parts` (joined) and `steps`, the parameters become an array of shape `stack + core`: `stack` are the loops
  that slice it, one index an iteration. The value itself runs along `core` on its own `axes` (increasing) and repeats
  along the others.

  scale: the coefficient, while it is a number.
  chained: the coefficient is an array, made by operations that `Survey.chains` knows; `varies` along these axes.
  met: parameters of computed values that took part in it.
  gains: other weights by which this one was multiplied.
  meeting: the last operation in which it met data entry by entry, named by its output.
  spread: it was repeated since.
  unique: no entry appears twice.
  levels: at which depths of nested loops it was sliced.
  bent: its entries are not in proportion to the parameter's: they went through a curve, or were shifted by what the
    parameter itself makes.
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

  # --- how it is laid out

  def _then(self, name: str, args: Any, apply: Callable, core: tuple[int, ...]) -> Weight:
    """Appends a step on the core; steps that undo each other are dropped, so that equal layouts have equal keys."""
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
    """The parameters with one axis for each group of this value's axes, reshaped; the loops that slice them lead."""
    kept = [self.axes.index(a) for group in groups for a in group if a in self.axes]
    kept += [k for k in range(len(self.axes)) if k not in kept]  # of length one
    w = self._then('transpose', tuple(kept), lambda x: x, tuple(self.core[k] for k in kept))
    loops = math.prod(self.stack)
    full = (loops * shape[0], *shape[1:])
    w = w._replace(stack=(), core=(*self.stack, *w.core))._then('reshape', full, lambda x: x, full)
    return Arrangement(self.params, (self.stack, *w._key()), w._apply, full)

  # --- how operations move it

  def transposed(self, perm: tuple[int, ...]) -> Weight:
    order = tuple(self.axes.index(a) for a in perm if a in self.axes)
    w = self._then('transpose', order, lambda x: x, tuple(self.core[k] for k in order))
    return w._replace(
      axes=tuple(j for j, a in enumerate(perm) if a in self.axes),
      varies=frozenset(j for j, a in enumerate(perm) if a in self.varies),
      gains=tuple(g.transposed(perm) for g in self.gains),
    )

  def broadcast(self, old: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...]) -> Weight:
    """After lax.broadcast_in_dim of a value of shape `old`."""
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
    """After a reshape; None where repeated axes would be merged with the parameter's own."""
    core, axes, varies = [], [], set()
    for before, after in _groups(old, shape):
      long = [a for a in before if old[a] != 1]
      own = [a for a in long if a in self.axes]
      if own and len(own) < len(long):
        return None
      if own:
        axes += after
        core += [shape[a] for a in after]
        if self.varies & set(own):
          varies |= set(after)
    w = self._then('reshape', tuple(core), lambda x: x, tuple(core))
    gains = tuple(g.reshaped(old, shape) for g in self.gains)
    return None if None in gains else w._replace(axes=tuple(axes), varies=frozenset(varies), gains=gains)

  def picked(self, old: tuple[int, ...], new: tuple[int, ...], name: str, args: Any, apply: Callable) -> Weight | None:
    """After an operation on the whole value, such as a slice, whose result has one axis for each of the value's."""
    whole = all(a in self.axes for a in range(len(old)))
    if not whole and not (name == 'slice' and all(old[a] == new[a] for a in range(len(old)) if a in self.axes)):
      return None
    if not whole:
      return self
    return self._then(name, args, apply, new)

  def beside_examples(self) -> Weight:
    """Without a first axis of length one, which is that of a single example."""
    if 0 not in self.axes or self.core[self.axes.index(0)] != 1:
      return self
    at = self.axes.index(0)
    core = self.core[:at] + self.core[at + 1 :]
    w = self._then('reshape', core, lambda x: x, core)
    return w._replace(axes=self.axes[:at] + self.axes[at + 1 :], varies=self.varies - {0})

  def sliced_by_loop(self, depth: int) -> Weight:
    """One iteration's part of a value that a loop slices along its first axis."""
    rest = self._replace(
      axes=tuple(a - 1 for a in self.axes if a),
      varies=frozenset(a - 1 for a in self.varies if a),
      gains=tuple(g.sliced_by_loop(depth) for g in self.gains),
    )
    if 0 not in self.axes:
      return rest
    return rest._replace(stack=(*self.stack, self.core[0]), core=self.core[1:], levels=(*self.levels, depth))

  def covers(self, shape: tuple[int, ...]) -> bool:
    """Whether a value of this shape repeats nothing."""
    return self.unique and all(size == 1 or a in self.axes for a, size in enumerate(shape))


def joined(parts: Sequence[Weight], name: str, args: Any, apply: Callable, core: tuple[int, ...]) -> Weight | None:
  """A concatenation of whole weights of different parameters."""
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
  """The smallest runs of axes that a reshape maps onto each other."""
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
