"""Gathers sites into blocks: which parameters share a block of the curvature, and what stays outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..program import Program, source_line
from .block import Block
from .errors import CurvatureError
from .kernel_blocks import Use, flops, kernel_block
from .operators import Embedding, Unit
from .operators.unit import diagonal
from .options import Options, chosen
from .parts import Split
from .reach import biases, reaching
from .sites import Site, Survey
from .statistics import BlockSums
from .tapped import Tap, Taps
from .weights import Arrangement


class Plan(NamedTuple):
  """How one program's blocks are filled.

  blocks: in the order of the parameters.
  taps: where the probes go.
  probes: shapes, by block and statistic; they lead with `loops`, the lengths of the loops that slice the block.
  gradient_only: the parameters without a block, each with the reason.
  regularised: the parameters that have a block and a term of their own in the loss.
  split: the shards of the batch.
  aux_tree: the structure of the loss's auxiliary output, if any.
  """

  blocks: tuple[Block, ...]
  taps: Taps
  probes: dict[str, BlockSums]
  loops: dict[str, tuple[int, ...]]
  gradient_only: dict[str, str]
  regularised: tuple[str, ...]
  split: Split
  aux_tree: Any = None


def plan_blocks(
  program: Program,
  survey: Survey,
  names: Sequence[str],
  shapes: Sequence[tuple[int, ...]],
  options: Options,
  from_loss: bool,
  observations: tuple[int, ...],
) -> Plan:
  """The blocks of a survey.

  Args:
    from_loss: whether the loss's own gradients make the curvature (the empirical Fisher), or the observed outputs.
    observations: the lengths of the axes that count examples, where they are known.

  Raises:
    CurvatureError: a parameter is refused or unused and no fallback was chosen for it, or a choice does not fit.
  """
  options.check(names)
  double = next((name for name in names if names.count(name) > 1), None)
  if double is not None:
    raise CurvatureError(f'two parameters are called {double!r}; rename one')
  live = reaching(program, survey, from_loss)
  observed = reaching(program, survey, False) if from_loss else live
  sites = [s for group in survey.sites.values() for s in group if s.key in live]
  refused: dict[int, str] = {}
  for param, refusals in survey.refusals.items():
    for refusal in refusals:
      if refusal.key in (observed if refusal.before_marks else live):
        refused.setdefault(param, f'used by {refusal.reason} at {refusal.line}, which is not understood')
  own = lambda site: survey.owners(site.weight)  # noqa: E731
  empty = {p for p, shape in enumerate(shapes) if not math.prod(shape)}
  sites = [s for s in sites if not set(own(s)) & empty]
  refused = {p: r for s in sites for p in own(s) for q in own(s) if (r := refused.get(q))} | refused
  sites = [s for s in sites if not set(own(s)) & set(refused)]
  uses = _uses(sites, survey, biases(program, survey, live), options)
  joined = {u.shift.key for group in uses for u in group if u.shift is not None}
  for use in (use for group in uses for use in group if use.site.key not in joined):
    reason = _without_examples(use.site, observations)
    if reason:
      line = source_line(use.site.op)
      refused |= {p: f'used by {reason} at {line}, which is not understood' for p in use.layout.params}
  _refuse_overlaps(uses, shapes, refused)
  uses = [group for group in uses if not {p for u in group for p in u.layout.params} & set(refused)]
  found = {}
  for group in uses:
    if group[0].site.key not in joined:
      pieces = [name for name in found if name.split('[')[0] == names[group[0].layout.params[0]]]
      block, taps = _block(group, names, shapes, options, len(pieces), observations)
      found[block.name] = block, taps
  blocks = {name: block for name, (block, _) in found.items()}
  by_key: dict[int, list[Tap]] = {}
  for _, taps in found.values():
    for tap in taps:
      by_key.setdefault(tap.site.key, []).append(tap)
  gradient_only: dict[str, str] = {}
  owned = {p for block in blocks.values() for p in block.params}
  in_loss = reaching(program, survey, True, through_kernels=True)
  for param, name in enumerate(names):
    if name in owned:
      continue
    choice = chosen(options.fallback, name)
    reason = 'it has no entries' if param in empty else _own_terms(param, program, survey, in_loss)
    if choice == 'diagonal':
      dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
      blocks[name] = Block(name, (name,), diagonal(param, shapes[param]), dtype, sampled_diagonal=True)
    elif choice == 'gradient' or (reason and param not in refused):
      gradient_only[name] = 'as chosen' if choice else reason
    else:
      _complain(name, refused.get(param), param, survey, in_loss)
  reduced = next((b.name for b in blocks.values() if b.operator.reduced is not None), None)
  for b in blocks.values():
    if b.operator.reduced is not None and observations and b.operator.reduced not in observations:
      raise CurvatureError(
        f"sharing={{{b.name!r}: 'reduce'}}: its uses lead with {b.operator.reduced}, the observations with "
        f'{" or ".join(map(str, observations))}; '
        "examples must lead both, or use 'expand'"
      )
  if reduced is not None and any(depth for _, depth, _ in survey.marks):
    raise CurvatureError(
      f"sharing={{{reduced!r}: 'reduce'}}: outputs are observed inside of a loop, so its iterations are examples of their "
      "own; use 'expand', or accumulate microbatches outside by kron.accumulate"
    )
  order = {name: i for i, name in enumerate(names)}
  ordered = tuple(sorted(blocks.values(), key=lambda b: (order[b.params[0]], b.name)))
  regularised = tuple(n for i, n in enumerate(names) if i in survey.regularisers and n in owned)
  probes, loops = {}, {}
  for name, (block, taps) in found.items():
    loops[name] = (taps[0].lifted or taps[0].site).weight.stack
    # The rows that *reduce* keeps are split at the end; counts are of all shards.
    lead = options.split.lead if block.operator.reduced is None else ()
    own = block.operator.probes()
    products = {k: (*loops[name], *lead, *shape) for k, shape in own.products.items()}
    probes[name] = BlockSums(products, {k: (*loops[name], *shape) for k, shape in own.uses.items()})
  return Plan(ordered, Taps(by_key, survey.chains, from_loss), probes, loops, gradient_only, regularised, options.split)


def _without_examples(site: Site, observations: tuple[int, ...]) -> str | None:
  """Why a site cannot tell examples apart, if it cannot."""
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


def _uses(
  sites: Sequence[Site], survey: Survey, shifts: Mapping[int, tuple[Site, tuple[int, ...]]], options: Options
) -> list[list[Use]]:
  """Sites grouped by block: those of the same matrix, perhaps transposed, or of the same channels."""
  groups: dict[tuple, list[Use]] = {}

  def order(site: Site) -> int:
    """A table is laid out as its look-up sees it, and a matrix as data do, whatever comes first in the program."""
    return 2 if site.weight.params[0] < 0 else not (site.linear is not None and site.linear.one_hot)

  for site in sorted(sites, key=order):
    shift, axes = shifts.get(site.key, (None, ())) if site.kind != 'gain' else (None, ())
    if shift is not None and shift.weight.params[0] < 0:
      shift = None  # the product of a kernel and a constant, which has a block of its own
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
  """The kernel as (slots, rows, columns) of the operation, or of its transpose."""
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
  """Keeps the shift with its kernel or scale where every use of the shift is one of this group, else drops it."""
  shifts = [u for u in group if u.shift is not None]
  layouts = {_identity(u.shift_layout) for u in shifts}
  params = {p for u in shifts for p in u.shift.weight.params}
  everywhere = {u.shift.key for u in shifts} == {s.key for s in sites if set(s.weight.params) & params}
  alone = not params & {p for u in group for p in u.layout.params}
  if group[0].linear is not None:
    kernels = [u.linear.linear for u in group]
    # A scale of the columns is not the bias's.
    scaled = any(u.site.weight.varies - set(u.linear.linear.row_axes) for u in group)
    fits = not scaled and not any(k.one_hot for k in kernels) and kernels[0].n_in < options.max_factor
  else:
    fits = len(shifts) == len(group) and group[0].site.weight.unique
  if len(layouts) == 1 and everywhere and alone and fits:
    return group
  return [u._replace(shift=None, shift_layout=None) for u in group]


def _refuse_overlaps(groups: list[list[Use]], shapes: Sequence[tuple[int, ...]], refused: dict[int, str]) -> None:
  """Refuses parameters of which two blocks would hold the same entries."""
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
  """For each entry of a parameter whether it is in the layout."""
  with jax.ensure_compile_time_eval():
    numbers = [
      np.arange(1, math.prod(shapes[p]) + 1, dtype=np.int32).reshape(shapes[p]) * (p == param) for p in layout.params
    ]
    there = np.asarray(layout.apply(*(jnp.asarray(n) for n in numbers))).reshape(-1)
  found = np.zeros(math.prod(shapes[param]) + 1, int)
  found[there] = 1
  return found[1:]


def _block(
  group: list[Use],
  names: Sequence[str],
  shapes: Sequence[tuple[int, ...]],
  options: Options,
  pieces: int,
  observations: tuple[int, ...],
) -> tuple[Block, list[Tap]]:
  first = group[0]
  layout, linear = first.layout, first.linear
  weight = first.site.weight if linear is None else linear.weight
  shift = next((u for u in group if u.shift is not None), None)
  params = list(layout.params) + ([] if shift is None else list(shift.shift_layout.params))
  sizes = tuple(tuple(shapes[p]) for p in params)
  own_names = tuple(names[p] for p in params)
  loops = math.prod(weight.stack)
  dtype = jnp.promote_types(jnp.finfo(first.site.op.outputs[0].dtype).dtype, jnp.float32)
  if linear is not None:
    operator = kernel_block(group, sizes, loops, own_names[0], options)
    cost = sum(flops(u.linear, operator) for u in group)
  else:
    layouts = (layout,) if shift is None else (layout, shift.shift_layout)
    name = 'scale and shift' if shift is not None else _unit_name(first.site)
    spread = None if weight.unique else layout
    if spread is not None:
      layouts = diagonal(params[0], sizes[0]).layouts
    operator, cost = Unit(name, layouts, sizes, loops, spread), 0
  covered = math.prod(layout.shape) + (0 if shift is None else math.prod(shift.shift_layout.shape))
  partial = weight.unique and covered < sum(math.prod(size) for size in sizes)
  name = own_names[0] + (f'[{pieces}]' if pieces else '')
  lifted = lambda u: None if u.linear is u.site else u.linear  # noqa: E731
  taps = [Tap(name, u.site, operator, u.shift is not None, u.transposed, lifted(u), options.split) for u in group]
  taps = [tap._replace(splits=_splits(tap, observations)) for tap in taps]
  whole_batch = not options.split.trivial and not all(tap.splits for tap in taps)
  cost = cost if whole_batch else int(cost * options.split.part)
  block = Block(name, own_names, operator, dtype, partial=partial, flops=cost, whole_batch=whole_batch)
  return block, taps


def _splits(tap: Tap, observations: tuple[int, ...]) -> bool:
  """Whether a site's rows lead with examples that divide into shards."""
  site = tap.site
  if tap.operator.reduced is not None:
    return tap.split.fits(tap.operator.reduced)
  if site.sharded or (site.linear is not None and site.linear.examples is None):
    return False
  if tap.lifted is not None:
    return False
  axis = site.linear.examples[1] if site.linear is not None else 0
  shape = site.op.inputs[site.position].shape if site.kind == 'free' else site.op.outputs[0].shape
  length = shape[axis]
  led = not observations or any(length % n == 0 for n in observations)
  return led and tap.split.fits(length)


def _unit_name(site: Site) -> str:
  if site.kind == 'entrywise':
    return {'mul': 'scale', 'add': 'shift', 'sub': 'shift', 'add_any': 'shift'}.get(site.op.name, site.op.name)
  return {'gain': 'gain', 'free': 'free'}[site.kind]


def _own_terms(param: int, program: Program, survey: Survey, in_loss: set[int]) -> str | None:
  """Why a parameter without a block needs none, if so."""
  sites = [s for group in survey.sites.values() for s in group if param in survey.owners(s.weight)]
  if any(s.key in in_loss for s in sites):
    return None
  if param in survey.regularisers or any(r.key in in_loss for r in survey.refusals.get(param, ())):
    return 'only in terms of its own'
  read = any(op is not None for op in survey.readers.get(program.inputs[param].index, ()))
  return 'it has no gradient' if read else None


def _complain(name: str, refusal: str | None, param: int, survey: Survey, in_loss: set[int]) -> None:
  choose = f"fallback={{{name!r}: 'diagonal'}} or 'gradient'"
  if refusal is not None:
    raise CurvatureError(f'parameter {name!r} is {refusal}; change that, or pass {choose}')
  if any(param in survey.owners(s.weight) and s.key in in_loss for group in survey.sites.values() for s in group):
    raise CurvatureError(
      f'parameter {name!r} reaches the loss but no observed output other than by scaling a weight; mark its output by '
      f'kron.observe, or pass {choose}'
    )
  raise CurvatureError(f'parameter {name!r} is never used by the loss; take it out of params, or pass {choose}')
