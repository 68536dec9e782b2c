"""The parts of a survey that matter: sites whose gradients reach the curvature, and the biases that join them."""

from __future__ import annotations

from collections.abc import Iterable

from ...program import Op, Program, Ref, has_mark, observe_p, scan_split
from .sites import Site, Survey


def reaching(program: Program, survey: Survey, from_loss: bool, through_kernels: bool = False) -> set[int]:
  """Returns the keys (first outputs) of the operations from which a gradient flows into the curvature.

  from_loss: whether the gradient starts from the loss (the empirical Fisher) or from the observed outputs.
  through_kernels: whether the operations that compute a kernel count. For the curvature they do not: a computed scale
    of a kernel is treated as a constant.
  """
  keys: set[int] = set()
  sites = {} if through_kernels else survey.sites
  _trace_back(program, survey._replace(sites=sites), program.outputs[:1] if from_loss else (), not from_loss, keys)
  return keys


def _trace_back(program: Program, survey: Survey, outputs: Iterable, from_marks: bool, keys: set[int]) -> set[int]:
  """Adds the keys of one program and returns the values in it that matter."""
  live = {v.index for v in outputs if isinstance(v, Ref)}
  for op in reversed(program.ops):
    observed = from_marks and has_mark(op)
    if op.name != 'stop_gradient' and (observed or any(v.index in live for v in op.outputs)):
      keys.add(op.outputs[0].index)
      live |= {v.index for v in _sources(op, survey, live, from_marks, keys) if isinstance(v, Ref)}
  return live


def _sources(op: Op, survey: Survey, live: set[int], from_marks: bool, keys: set[int]) -> list:
  """Returns the operands of a live operation that matter."""
  if op.bodies:
    return _sources_of_region(op, survey, live, from_marks, keys)
  if op.name == observe_p.name:
    return list(op.inputs[:1])
  kernels = {site.position for site in survey.sites.get(op.outputs[0].index, ())}
  return [v for i, v in enumerate(op.inputs) if i not in kernels]


def _sources_of_region(op: Op, survey: Survey, live: set[int], from_marks: bool, keys: set[int]) -> list:
  wanted = [v.index in live for v in op.outputs]
  if op.region == 'scan':
    (body,) = op.bodies
    n_consts, n_carry = scan_split(op)
    while True:
      inner = _trace_back(body, survey, [v for v, w in zip(body.outputs, wanted, strict=True) if w], from_marks, keys)
      carried = [v.index in inner for v in body.inputs[n_consts : n_consts + n_carry]]
      now = [a or b for a, b in zip(wanted[:n_carry], carried, strict=True)] + wanted[n_carry:]
      if now == wanted:
        break
      wanted = now
    pairs = list(zip(body.inputs, op.inputs, strict=True))
  else:
    operands = op.inputs[1:] if op.region == 'cond' else op.inputs
    inner, pairs = set(), []
    for body in op.bodies:
      inner |= _trace_back(body, survey, [v for v, w in zip(body.outputs, wanted, strict=True) if w], from_marks, keys)
      pairs += zip(body.inputs, operands, strict=True)
  free = {site.position for site in survey.sites.get(op.outputs[0].index, ())}
  taken = {id(op.inputs[i]) for i in free}
  return [outer for v, outer in pairs if v.index in inner and id(outer) not in taken]


def biases(program: Program, survey: Survey, keys: set[int]) -> dict[int, tuple[Site, tuple[int, ...]]]:
  """Maps the key of each linear site or scale to the shift that is added to its result.

  The shift is added directly or after casts and transposes. The map also gives the axes of the sum that are the
  features of the first site, in their order.
  """
  result: dict[int, tuple[Site, tuple[int, ...]]] = {}
  for op in program.ops:
    for body in op.bodies:
      result |= biases(body, survey, keys)
    for site in survey.sites.get(op.outputs[0].index, ()) if op.outputs else ():
      scale = site.kind == 'entrywise' and (op.name == 'mul' or (op.name == 'div' and site.position == 0))
      if site.kind == 'linear' or scale:
        shift, axes = _shift_after(site, survey)
        if shift is not None and {site.key, shift.key} <= keys:
          result[site.key] = shift, axes
  return result


def _shift_after(site: Site, survey: Survey) -> tuple[Site | None, tuple[int, ...]]:
  """Returns the shift added to a site's result, if nothing else reads the result, and the axes of its features."""
  value, axes = site.op.outputs[0], tuple(site.features)
  while True:
    following = survey.readers.get(value.index, [])
    if len(following) != 1 or following[0] is None:
      return None, axes
    (op,) = following
    if op.name == 'transpose':
      axes = tuple(op.params['permutation'].index(a) for a in axes)
    elif op.name == 'reshape' and _trailing(value.shape, op.outputs[0].shape, axes):
      axes = tuple(a + len(op.outputs[0].shape) - len(value.shape) for a in axes)
    elif op.name not in ('convert_element_type', 'copy', 'copy_p', 'reduce_precision'):
      shifts = [s for s in survey.sites.get(op.outputs[0].index, ()) if s.kind == 'entrywise'] if op.outputs else []
      joins = len(shifts) == 1 and op.outputs[0].shape == value.shape and _runs_along(shifts[0], axes, site)
      return (shifts[0] if joins else None), axes
    value = op.outputs[0]


def _trailing(old: tuple[int, ...], new: tuple[int, ...], axes: tuple[int, ...]) -> bool:
  """Returns whether these are the last axes and a reshape leaves them unchanged."""
  n = len(axes)
  return axes == tuple(range(len(old) - n, len(old))) and old[len(old) - n :] == new[len(new) - n :]


def _runs_along(shift: Site, axes: tuple[int, ...], site: Site) -> bool:
  """Returns whether the shift is plain and has one entry for each index along these axes."""
  weight, shape = shift.weight, shift.op.outputs[0].shape
  plain = shift.op.name in ('add', 'add_any') and not weight.chained and weight.scale == 1 and weight.unique
  same_loops = weight.stack == site.weight.stack and shift.loops == site.loops
  return plain and same_loops and {a for a in weight.axes if shape[a] != 1} == {a for a in axes if shape[a] != 1}
