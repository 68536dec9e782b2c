"""Audits what a program communicates, from its compiled form, so that the audit needs no accelerator.

XLA decides where arrays are gathered and reduced. `audit` lists each collective of the compiled program with its bytes,
the mesh axes it runs along, and the source line it came from. `written` lists the collectives that a program itself
asks for, before any compiler changes them (the CPU's widens bfloat16).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from .hlo import Instruction, parse

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all', 'collective-broadcast')


class AuditError(AssertionError):
  """Reports a program that communicates something that it must not."""


class Collective(NamedTuple):
  """Describes one collective of a program.

  Attributes:
    kind: 'all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all' or 'collective-broadcast'.
    shapes: the types of the arrays that take part, such as 'f32[8,16]'.
    bytes: the size, for one execution, of the whole arrays that are gathered or reduced, or that one device passes on.
    axes: the mesh axes along which it runs, 'data' or 'data,model'; 'data/2' for groups of 2 along a longer axis.
    group: the number of devices in one group.
    count: the number of times it runs, by the trip counts of the loops around it.
    exact: whether the trip counts of all loops around it are known; an unknown one counts as 1.
    source: the innermost line outside of installed packages, such as 'file.py:12'; '' in the result of `written`.
  """

  kind: str
  shapes: tuple[str, ...]
  bytes: int
  axes: str
  group: int
  count: int
  exact: bool
  source: str

  @property
  def total(self) -> int:
    """Returns the bytes of all executions."""
    return self.bytes * self.count

  @property
  def sent(self) -> float:
    """Returns the fewest bytes that a device can send: (n - 1) / n of the array, or twice that for an all-reduce."""
    share = (self.group - 1) / self.group
    return self.total * {'all-reduce': 2 * share, 'collective-permute': 1, 'collective-broadcast': 1}.get(
      self.kind, share
    )

  def __str__(self) -> str:
    times = f'{self.count} x ' if self.count > 1 else ''
    unknown = '' if self.exact else ' or more'
    return (
      f'{self.kind} over {self.axes}: {times}{self.bytes} bytes{unknown} ({" ".join(self.shapes)}) at {self.source}'
    )


class Audit(tuple[Collective, ...]):
  """Holds the collectives of one program, a tuple of `Collective`s; it prints as a table."""

  def select(self, kind: str | None = None, axis: str | None = None) -> Audit:
    """Returns the collectives of a kind, or those that run along a mesh axis (perhaps with others).

    Args:
      kind: a kind of `Collective`; None for all.
      axis: the name of a mesh axis; None for all.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind is not None and kind not in KINDS:
      raise ValueError(f'kind={kind!r} is unknown; choose from {", ".join(KINDS)}')
    along = lambda c: axis in [a.partition('/')[0] for a in c.axes.split(',')]  # noqa: E731
    return Audit(c for c in self if (kind is None or c.kind == kind) and (axis is None or along(c)))

  def bytes(self, kind: str | None = None, axis: str | None = None) -> int:
    """Returns the sum of `Collective.total` over the collectives that `select` returns for this `kind` and `axis`."""
    return sum(c.total for c in self.select(kind, axis))

  def sent(self, kind: str | None = None, axis: str | None = None) -> float:
    """Returns the sum of `Collective.sent` over the collectives that `select` returns for this `kind` and `axis`.

    A gather along two axes, one after another, counts as one along both.
    """
    return sum(c.sent for c in self.select(kind, axis))

  def summary(self) -> dict[str, tuple[int, int]]:
    """Returns a map such as 'all-gather over data' -> (executions, bytes), as golden tables hold it."""
    totals: dict[str, tuple[int, int]] = {}
    for c in self:
      name = f'{c.kind} over {c.axes}'
      count, size = totals.get(name, (0, 0))
      totals[name] = count + c.count, size + c.total
    return dict(sorted(totals.items()))

  def __str__(self) -> str:
    if not self:
      return 'no collectives'
    rows = [('collective', 'axes', 'count', 'bytes', 'arrays', 'source')]
    for c in sorted(self, key=lambda c: -c.total):
      count = f'{c.count}{"" if c.exact else "+"}'
      rows.append((c.kind, c.axes, count, str(c.total), ' '.join(c.shapes)[:60], c.source))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def audit(fn: Any, *args: Any, mesh: Mesh, **kwargs: Any) -> Audit:
  """Lists the collectives of a compiled program.

  It counts both branches of a conditional.

  Args:
    fn: a jitted function, or a result of `.lower(...).compile()`.
    *args: the function's arguments, or their ShapeDtypeStructs with shardings; none for a compiled one.
    mesh: the mesh whose axes the list names.
    **kwargs: the function's keyword arguments.

  Returns:
    An `Audit`, the `Collective`s in the order of the program.
  """
  compiled = fn if hasattr(fn, 'as_text') and not hasattr(fn, 'lower') else fn.lower(*args, **kwargs).compile()
  program = parse(compiled.as_text())
  return Audit(_collective(i, count, exact, mesh) for i, count, exact in program.walk() if _kind(i) is not None)


def _kind(instruction: Instruction) -> str | None:
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in KINDS else None


def _collective(i: Instruction, count: int, exact: bool, mesh: Mesh) -> Collective:
  kind, arrays = _kind(i), i.arrays
  if i.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
    arrays = arrays[1:2]  # (operand, result, ...)
  group = _first_group(i.attributes, mesh.size)
  size = sum(a.bytes for a in arrays) * (len(group) if kind == 'reduce-scatter' else 1)
  if kind == 'collective-permute':
    axes, n = _axes_of_pairs(i.attributes, mesh), 2
  else:
    axes, n = _axes(group, mesh), len(group)
  return Collective(kind, tuple(map(str, arrays)), size, axes, n, count, exact, i.source)


def _first_group(attributes: str, devices: int) -> list[int]:
  """Returns the devices of one replica group, in any of the notations of XLA."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
  if listed:
    return [int(d) for d in listed[1].split(',') if d] or list(range(devices))
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  if iota:
    shape, dims = ([int(d) for d in iota[k].split(',')] for k in (1, 2))
    ids = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      ids = ids.transpose([int(d) for d in iota[3].split(',')])
    return ids.reshape(shape)[0].tolist()
  named = re.search(r'replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}', attributes)
  if named:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    order = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?\)?$', named[2].strip())
    ids = np.arange(math.prod(sizes.values()))
    if order:
      ids = ids.reshape([int(d) for d in order[1].split(',')])
      ids = ids.transpose([int(d) for d in order[2].split(',')]) if order[2] else ids
    ids = ids.reshape(tuple(sizes.values()))
    # Either 'axis', or a part of an axis as 'axis':(before)size.
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])
    index: list[Any] = [0] * ids.ndim
    members = ids
    for name, before, size in parts:
      k = list(sizes).index(name)
      along = np.arange(sizes[name])
      if size:
        after = sizes[name] // (int(before) * int(size))
        along = np.arange(int(size)) * after
      index[k] = along
    grid = np.ix_(*[np.atleast_1d(x) for x in index])
    return members[grid].reshape(-1).tolist()
  return list(range(devices))


def _axes(devices: list[int], mesh: Mesh) -> str:
  """Returns the names of the mesh axes along which these devices differ."""
  places = np.array(np.unravel_index(devices, tuple(mesh.shape.values())))
  names = []
  for name, size, along in zip(mesh.axis_names, mesh.shape.values(), places, strict=True):
    distinct = len(set(along.tolist()))
    if distinct > 1:
      names.append(name if distinct == size else f'{name}/{distinct}')
  return ','.join(names) or 'none'


def _axes_of_pairs(attributes: str, mesh: Mesh) -> str:
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}?[,\s]', attributes + ' ')
  axes: list[str] = []
  for a, b in re.findall(r'\{(\d+),(\d+)\}', '{' + pairs[1] + '}}') if pairs else ():
    for name in _axes([int(a), int(b)], mesh).split(','):
      name = name.partition('/')[0]
      if name not in axes:
        axes.append(name)
  axes = [name for name in axes if name != 'none'] or ['none']
  return ','.join(name for name in (*mesh.axis_names, 'none') if name in axes)


def assert_no_gather(audit: Audit, larger_than: int = 0, axis: str | None = None) -> None:
  """Checks that no all-gather along an axis moves more than `larger_than` bytes in one execution.

  Args:
    audit: the collectives, from `audit` or `written`.
    larger_than: the most bytes of one gather.
    axis: the name of a mesh axis; None for all.

  Raises:
    AuditError: a gather is larger; the message names each with its bytes and source line.
  """
  bad = [c for c in audit.select('all-gather', axis) if c.bytes > larger_than]
  if bad:
    raise AuditError(f'{len(bad)} gathers of more than {larger_than} bytes: ' + '; '.join(map(str, bad)))


def assert_bytes(audit: Audit, at_most: int, kind: str | None = None, axis: str | None = None) -> None:
  """Checks that the collectives of a kind along an axis move at most `at_most` bytes in all, in loops of known length.

  Args:
    audit: the collectives, from `audit` or `written`.
    at_most: the most bytes of all executions together.
    kind: a kind of `Collective`; None for all.
    axis: the name of a mesh axis; None for all.

  Raises:
    AuditError: they move more, or a loop's length is unknown; the message names each with its bytes and source line.
  """
  chosen = audit.select(kind, axis)
  total = chosen.bytes()
  unknown = [c for c in chosen if not c.exact]
  if total > at_most or unknown:
    what = f'{total} bytes' if total > at_most else 'loops of unknown length'
    listed = sorted(unknown or chosen, key=lambda c: -c.total)
    raise AuditError(f'{what} where {at_most} bytes are allowed: ' + '; '.join(map(str, listed)))


_PRIMITIVES = {
  'psum': 'all-reduce',
  'psum_invariant': 'all-reduce',
  'pmax': 'all-reduce',
  'pmin': 'all-reduce',
  'all_gather': 'all-gather',
  'all_gather_invariant': 'all-gather',
  'all_gather_reduced': 'all-gather',
  'reduce_scatter': 'reduce-scatter',
  'ppermute': 'collective-permute',
  'all_to_all': 'all-to-all',
}


def written(fn: Callable, *args: Any, mesh: Mesh, **kwargs: Any) -> Audit:
  """Lists the collectives that a function asks for in shard_map, with their types before compilation.

  A loop whose length is not fixed (`while_loop`) counts once.

  Args:
    fn: a function, which need not be jitted.
    *args: the function's arguments, or their ShapeDtypeStructs.
    mesh: the mesh whose axes the list names.
    **kwargs: options of `jax.make_jaxpr`, such as `static_argnums`.

  Returns:
    An `Audit`, whose `Collective`s name no source lines.
  """
  return Audit(_written(jax.make_jaxpr(fn, **kwargs)(*args).jaxpr, 1, mesh))


def _written(jaxpr: Any, count: int, mesh: Mesh, exact: bool = True) -> Iterator[Collective]:
  """Yields the collectives of a program. exact: False in the body of a `while`, whose number of runs is not known."""
  for eqn in jaxpr.eqns:
    kind = _PRIMITIVES.get(eqn.primitive.name)
    if kind is not None:
      axes = eqn.params.get('axes', eqn.params.get('axis_name', ()))
      axes = (axes,) if isinstance(axes, str) else tuple(axes)
      whole = eqn.outvars if kind == 'all-gather' else eqn.invars
      arrays = [v.aval for v in whole]
      size = sum(a.size * a.dtype.itemsize for a in arrays)
      group = math.prod(mesh.shape.get(a, 1) for a in axes)
      shapes = tuple(f'{a.dtype.name}[{",".join(map(str, a.shape))}]' for a in arrays)
      yield Collective(kind, shapes, size, ','.join(axes), group, count, exact, '')
    times = count * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    for value in eqn.params.values():
      for body in value if isinstance(value, tuple | list) else (value,):
        body = getattr(body, 'jaxpr', body)
        if hasattr(body, 'eqns'):
          yield from _written(body, times, mesh, exact and eqn.primitive.name != 'while')
