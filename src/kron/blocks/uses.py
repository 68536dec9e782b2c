"""Groups sites by the block they belong to, and refuses parameters whose uses no block can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ...program import Program, source_line
from ..operators import Embedding
from ..operators.weights import Arrangement
from ..reading.liveness import biases, reaching
from ..reading.sites import Site, Survey
from .kernel_blocks import Use
from .options import Options

Refused = dict[int, str]  # the reason, by parameter


def group_uses(
  program: Program,
  survey: Survey,
  shapes: Sequence[tuple[int, ...]],
  options: Options,
  from_loss: bool,
  observations: tuple[int, ...],
) -> tuple[list[list[Use]], Refused]:
  """Returns the uses of each block, and the refused parameters; the arguments are those of `plan.plan_blocks`.

  A shift that joins a kernel or a scale is among the uses of that block and does not form a group.
  """
  live = reaching(program, survey, from_loss)
  sites, refused = _understood(program, survey, shapes, from_loss, live)
  groups = _grouped(sites, survey, biases(program, survey, live), options)
  joined = {u.shift.key for group in groups for u in group if u.shift is not None}
  for use in (use for group in groups for use in group if use.site.key not in joined):
    reason = _without_examples(use.site, observations)
    if reason:
      line = source_line(use.site.op)
      refused |= {p: f'used by {reason} at {line}, which is not understood' for p in use.layout.params}
  _refuse_overlaps(groups, shapes, refused)
  groups = [group for group in groups if not {p for u in group for p in u.layout.params} & set(refused)]
  return [group for group in groups if group[0].site.key not in joined], refused


def _understood(
  program: Program, survey: Survey, shapes: Sequence[tuple[int, ...]], from_loss: bool, live: set[int]
) -> tuple[list[Site], Refused]:
  """Returns the live sites of parameters whose live uses are all understood, and why the others are refused."""
  observed = reaching(program, survey, False) if from_loss else live
  refused: Refused = {}
  for param, refusals in survey.refusals.items():
    for refusal in refusals:
      if refusal.key in (observed if refusal.before_marks else live):
        refused.setdefault(param, f'used by {refusal.reason} at {refusal.line}, which is not understood')
  empty = {p for p, shape in enumerate(shapes) if not math.prod(shape)}
  owners = lambda site: set(survey.owners(site.weight))  # noqa: E731
  sites = [s for group in survey.sites.values() for s in group if s.key in live and not owners(s) & empty]
  # If one parameter of a site is refused, all of them are.
  refused = {p: r for s in sites for p in owners(s) for q in survey.owners(s.weight) if (r := refused.get(q))} | refused
  return [s for s in sites if not owners(s) & set(refused)], refused


def _without_examples(site: Site, observations: tuple[int, ...]) -> str | None:
  """Returns the reason why a site cannot tell examples apart, or None if it can."""
  if site.kind in ('linear', 'gain') and not isinstance(site.linear, Embedding):
    return None
  if site.linear is not None and site.sharded and not site.differs:
    return f'{site.op.name} (of the same rows on all devices of a shard_map, whatever their examples)'
  shape = site.op.inputs[site.position].shape if site.kind == 'free' else site.op.outputs[0].shape
  if site.linear is not None and site.linear.examples is not None:
    shape = shape[site.linear.examples[1] :]
  alone = site.kind == 'free' and shape[:1] == (1,) and observations and 1 not in observations
  if not shape or alone or (site.linear is None and 0 in site.weight.axes):
    return f'{site.op.name} (with no leading axis that counts examples)'
  if observations and all(shape[0] % n and n % shape[0] for n in observations):
    counts = ' or '.join(map(str, observations))
    return f'{site.op.name} (whose leading axis has length {shape[0]}, which does not fit {counts} observations)'
  return None


def _grouped(
  sites: Sequence[Site], survey: Survey, shifts: Mapping[int, tuple[Site, tuple[int, ...]]], options: Options
) -> list[list[Use]]:
  """Groups sites by block: those of the same matrix, perhaps transposed, or of the same channels."""
  groups: dict[tuple, list[Use]] = {}

  def order(site: Site) -> int:
    """Sorts look-ups first and lifted kernels last, so that look-ups and data, not program order, set the layout."""
    return 2 if site.weight.params[0] < 0 else not (site.linear is not None and site.linear.one_hot)

  for site in sorted(sites, key=order):
    shift, axes = shifts.get(site.key, (None, ())) if site.kind != 'gain' else (None, ())
    if shift is not None and shift.weight.params[0] < 0:
      shift = None  # the product of a kernel and a constant, which has a separate block
    linear = site if site.kind == 'linear' else survey.lifted.get(site.weight.params[0])
    shift_layout = None
    if linear is not None:
      layout, flipped = _matrix(linear), _matrix(linear, flip=True)
      transposed = _identity(layout) not in groups and _identity(flipped) in groups
      layout = flipped if transposed else layout
      if shift is not None:
        shift_layout = shift.weight.arranged((linear.linear.slots, linear.linear.n_out), axes)
    else:
      layout, transposed = _channels(site), False
      if shift is not None:
        shift_layout = shift.weight.arranged((math.prod(shift.weight.core),), axes)
    if linear is not site:
      shift = shift if linear is None else None
    groups.setdefault(_identity(layout), []).append(Use(site, linear, layout, transposed, shift, shift_layout))
  return [_with_bias(group, sites, options) for group in groups.values()]


def _identity(layout: Arrangement) -> tuple:
  return layout.params, layout.key, layout.shape


def _matrix(site: Site, flip: bool = False) -> Arrangement:
  """Returns the kernel as (slots, rows, columns) of the operation, or of its transpose."""
  linear, weight = site.linear, site.weight
  shape = site.op.inputs[site.position].shape
  if linear.kernel_shape != shape:
    weight = weight.reshaped(shape, linear.kernel_shape)
  slots, rows, columns = linear.kernel_axes
  if flip:
    return weight.arranged((linear.slots, linear.n_out, linear.n_in), slots, columns, rows)
  return weight.arranged((linear.slots, linear.n_in, linear.n_out), slots, rows, columns)


def _channels(site: Site) -> Arrangement:
  return site.weight.arranged((math.prod(site.weight.core),), site.weight.axes)


def _with_bias(group: list[Use], sites: Sequence[Site], options: Options) -> list[Use]:
  """Keeps the shift with its kernel or scale if all uses of the shift are in this group, else drops it."""
  shifts = [u for u in group if u.shift is not None]
  layouts = {_identity(u.shift_layout) for u in shifts}
  params = {p for u in shifts for p in u.shift.weight.params}
  everywhere = {u.shift.key for u in shifts} == {s.key for s in sites if set(s.weight.params) & params}
  alone = not params & {p for u in group for p in u.layout.params}
  if group[0].linear is not None:
    kernels = [u.linear.linear for u in group]
    # A scale of the columns does not apply to the bias.
    scaled = any(u.site.weight.varies - set(u.linear.linear.row_axes) for u in group)
    fits = not scaled and not any(k.one_hot for k in kernels) and kernels[0].n_in < options.max_factor
  else:
    fits = len(shifts) == len(group) and group[0].site.weight.unique
  if len(layouts) == 1 and everywhere and alone and fits:
    return group
  return [u._replace(shift=None, shift_layout=None) for u in group]


def _refuse_overlaps(groups: list[list[Use]], shapes: Sequence[tuple[int, ...]], refused: Refused) -> None:
  """Refuses parameters if two blocks would hold the same entries of them."""
  by_param: dict[int, list[list[Use]]] = {}
  joined = {u.shift.key for group in groups for u in group if u.shift is not None}
  for group in groups:
    if group[0].site.key not in joined:
      for p in group[0].layout.params:
        by_param.setdefault(p, []).append(group)
  for param, several in by_param.items():
    seen = np.zeros(math.prod(shapes[param]), int)
    for group in several if len(several) > 1 else ():
      seen += _entries(group[0].layout, param, shapes)
    if seen.max(initial=0) > 1:
      first, second = (source_line(group[0].site.op) for group in several[:2])
      refused[param] = f'laid out as different matrices at {first} and at {second}'


def _entries(layout: Arrangement, param: int, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
  """Returns, for each entry of a parameter, whether it is in the layout."""
  with jax.ensure_compile_time_eval():
    numbers = [
      np.arange(1, math.prod(shapes[p]) + 1, dtype=np.int32).reshape(shapes[p]) * (p == param) for p in layout.params
    ]
    there = np.asarray(layout.apply(*(jnp.asarray(n) for n in numbers))).reshape(-1)
  counts = np.zeros(math.prod(shapes[param]) + 1, int)
  counts[there] = 1
  return counts[1:]
