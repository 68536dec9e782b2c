"""Gathers sites into blocks: which parameters share a block of the curvature, and which stay outside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...program import Program
from ..errors import CurvatureError
from ..measuring.shards import Shards
from ..measuring.site_vjp import Tap, Taps
from ..operators import Unit
from ..operators.unit import diagonal
from ..reading.liveness import reaching
from ..reading.sites import Site, Survey
from ..statistics import BlockSums
from .block import Block
from .kernel_blocks import Use, flops, kernel_block
from .options import Options, chosen
from .uses import Refused, group_uses


class Plan(NamedTuple):
  """The plan of one program: its blocks, and the probes that fill them.

  blocks: in the order of the parameters.
  taps: the places where the probes go.
  probes: shapes by block and statistic; they lead with `loops`, the lengths of the loops that slice the block.
  gradient_only: the parameters without a block, each with the reason.
  regularised: the parameters that have a block and also a separate term in the loss.
  shards: the shards of the batch.
  aux_tree: the structure of the loss's auxiliary output, if any.
  """

  blocks: tuple[Block, ...]
  taps: Taps
  probes: dict[str, BlockSums]
  loops: dict[str, tuple[int, ...]]
  gradient_only: dict[str, str]
  regularised: tuple[str, ...]
  shards: Shards
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
  """Plans the blocks of a survey.

  Args:
    from_loss: whether the curvature comes from gradients of the loss (the empirical Fisher), not from observed outputs.
    observations: the lengths of the axes that count examples, where they are known.

  Raises:
    CurvatureError: a parameter is refused or unused and no fallback was chosen for it, or a choice does not fit.
  """
  options.check(names)
  double = next((name for name in names if names.count(name) > 1), None)
  if double is not None:
    raise CurvatureError(f'two parameters are called {double!r}; rename one')
  groups, refused = group_uses(program, survey, shapes, options, from_loss, observations)
  tapped: dict[str, tuple[Block, list[Tap]]] = {}
  for group in groups:
    pieces = [name for name in tapped if name.split('[')[0] == names[group[0].layout.params[0]]]
    block, taps = _block(group, names, shapes, options, len(pieces), observations)
    tapped[block.name] = block, taps
  blocks = [block for block, _ in tapped.values()]
  owned = {p for block in blocks for p in block.params}
  diagonals, gradient_only = _without_sites(program, survey, names, shapes, options, refused, owned)
  _check_reduced(blocks, survey, observations)
  order = {name: i for i, name in enumerate(names)}
  ordered = tuple(sorted([*blocks, *diagonals], key=lambda b: (order[b.params[0]], b.name)))
  regularised = tuple(n for i, n in enumerate(names) if i in survey.regularisers and n in owned)
  by_key: dict[int, list[Tap]] = {}
  for _, taps in tapped.values():
    for tap in taps:
      by_key.setdefault(tap.site.key, []).append(tap)
  probes, loops = {}, {}
  for name, (block, taps) in tapped.items():
    loops[name] = (taps[0].lifted or taps[0].site).weight.stack
    # The rows that *reduce* keeps are divided into shards at the end; counts are for all shards.
    lead = options.shards.lead if block.operator.reduced is None else ()
    probe_shapes = block.operator.probes()
    products = {k: (*loops[name], *lead, *shape) for k, shape in probe_shapes.products.items()}
    probes[name] = BlockSums(products, {k: (*loops[name], *shape) for k, shape in probe_shapes.uses.items()})
  return Plan(
    ordered, Taps(by_key, survey.chains, from_loss), probes, loops, gradient_only, regularised, options.shards
  )


def _without_sites(
  program: Program,
  survey: Survey,
  names: Sequence[str],
  shapes: Sequence[tuple[int, ...]],
  options: Options,
  refused: Refused,
  owned: set[str],
) -> tuple[list[Block], dict[str, str]]:
  """Returns the sampled diagonals and the gradient-only parameters, with reasons, among those without a block."""
  diagonals, gradient_only = [], {}
  _warn_of_idle(options.fallback, owned)
  in_loss = reaching(program, survey, True, through_kernels=True)
  for param, name in enumerate(names):
    if name in owned:
      continue
    choice = chosen(options.fallback, name)
    reason = _own_terms(param, program, survey, in_loss) if math.prod(shapes[param]) else 'it has no entries'
    if choice == 'diagonal':
      dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
      diagonals.append(Block(name, (name,), diagonal(param, shapes[param]), dtype, sampled_diagonal=True))
    elif choice == 'gradient' or (reason and param not in refused):
      gradient_only[name] = 'as chosen' if choice else reason
    else:
      _complain(name, refused.get(param), param, survey, in_loss)
  return diagonals, gradient_only


def _warn_of_idle(fallback: Mapping[str, str], owned: set[str]) -> None:
  """Warns of a fallback for one parameter whose use is understood, because such a fallback does nothing."""
  for name in fallback.keys() & owned:
    warnings.warn(
      f'fallback for {name!r} does nothing: its use is understood, and it has a block; approximation={{{name!r}: ...}} '
      'or max_factor= makes the block smaller, optax.partition gives the parameter to another optimiser',
      stacklevel=6,
    )


def _check_reduced(blocks: Sequence[Block], survey: Survey, observations: tuple[int, ...]) -> None:
  """Raises CurvatureError for sharing='reduce' where the uses of one example cannot be identified."""
  reduced = [b for b in blocks if b.operator.reduced is not None]
  for b in reduced:
    if observations and b.operator.reduced not in observations:
      raise CurvatureError(
        f"sharing={{{b.name!r}: 'reduce'}}: its uses lead with {b.operator.reduced}, the observations with "
        f'{" or ".join(map(str, observations))}; '
        "examples must lead both, or use 'expand'"
      )
  if reduced and any(depth for _, depth, _ in survey.marks):
    raise CurvatureError(
      f"sharing={{{reduced[0].name!r}: 'reduce'}}: outputs are observed inside of a loop, so its iterations are examples "
      "of their own; use 'expand', or accumulate microbatches outside by kron.accumulate"
    )


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
  taps = [Tap(name, u.site, operator, u.shift is not None, u.transposed, lifted(u), options.shards) for u in group]
  taps = [tap._replace(by_shard=_splits(tap, observations)) for tap in taps]
  whole_batch = not options.shards.trivial and not all(tap.by_shard for tap in taps)
  cost = cost if whole_batch else int(cost * options.shards.subsample)
  block = Block(name, own_names, operator, dtype, partial=partial, flops=cost, whole_batch=whole_batch)
  return block, taps


def _splits(tap: Tap, observations: tuple[int, ...]) -> bool:
  """Returns whether a site's rows lead with examples that divide into shards."""
  site = tap.site
  if tap.operator.reduced is not None:
    return tap.shards.fits(tap.operator.reduced)
  if site.sharded or (site.linear is not None and site.linear.examples is None):
    return False
  if tap.lifted is not None:
    return False
  axis = site.linear.examples[1] if site.linear is not None else 0
  shape = site.op.inputs[site.position].shape if site.kind == 'free' else site.op.outputs[0].shape
  length = shape[axis]
  led = not observations or any(length % n == 0 for n in observations)
  return led and tap.shards.fits(length)


def _unit_name(site: Site) -> str:
  if site.kind == 'entrywise':
    return {'mul': 'scale', 'add': 'shift', 'sub': 'shift', 'add_any': 'shift'}.get(site.op.name, site.op.name)
  return {'gain': 'gain', 'free': 'free'}[site.kind]


def _own_terms(param: int, program: Program, survey: Survey, in_loss: set[int]) -> str | None:
  """Returns the reason why a parameter without a block needs none, or None if it needs one."""
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
