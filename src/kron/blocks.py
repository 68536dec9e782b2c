"""Gathers sites into blocks: which parameters share a block of the curvature, and what stays outside."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .errors import CurvatureError
from .evaluate import Tap
from .operators import Kronecker, Unit
from .operators.unit import diagonal
from .program import Op
from .sites import Site, Survey

FALLBACKS = ('gradient', 'diagonal')


class Block(NamedTuple):
  """One diagonal block of the curvature. `name` is that of its first parameter, `params` are in the operator's order."""

  name: str
  params: tuple[str, ...]
  operator: Kronecker | Unit
  dtype: Any  # of its statistics
  sampled_diagonal: bool = False  # its statistic is a squared sum of gradients, for want of a site

  def signature(self) -> tuple:
    factors = tuple((name, f.slots, f.n) for name, f in self.operator.factors.items())
    return self.params, self.operator.name, factors


class Plan(NamedTuple):
  """How one program's blocks are filled.

  blocks: in the order of the parameters.
  taps: by site key.
  chains: as in the survey.
  uses: the rows that the input factor of a block sums over.
  gradient_only: the parameters without a block, each with the reason.
  aux_tree: the structure of the loss's auxiliary output, if any.
  """

  blocks: tuple[Block, ...]
  taps: dict[int, Tap]
  chains: dict[int, tuple[Op, int]]
  uses: dict[str, int]
  gradient_only: dict[str, str]
  aux_tree: Any = None


def param_names(params: Any) -> list[str]:
  """'path/to/kernel' for each leaf, in the order of jax.tree.leaves."""
  paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path in paths]


def plan_blocks(
  survey: Survey, names: Sequence[str], shapes: Sequence[tuple[int, ...]], fallback: Mapping[str, str]
) -> Plan:
  """The blocks of a survey.

  Raises:
    CurvatureError: a parameter is refused or unused and no fallback was chosen for it, or a fallback does not fit.
  """
  _check_fallbacks(fallback, names)
  blocks, taps, uses, gradient_only = [], {}, {}, {}
  refused = survey.refusals
  biases = {
    key: (shift, axes)
    for key, (shift, axes) in survey.biases.items()
    if not {survey.sites[key].weight.param, shift.weight.param} & set(refused)
  }
  joined = {shift.key for shift, _ in biases.values()}
  by_param = {site.weight.param: site for site in survey.sites.values()}
  for param, name in enumerate(names):
    site = by_param.get(param)
    if site is None or param in refused:
      choice = next((value for pattern, value in fallback.items() if fnmatch.fnmatch(name, pattern)), None)
      if choice == 'diagonal':
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        blocks.append(Block(name, (name,), diagonal(shapes[param]), dtype, sampled_diagonal=True))
      elif choice == 'gradient' or (param in survey.regularisers and param not in refused):
        gradient_only[name] = 'as chosen' if choice else 'only in terms of its own'
      else:
        _complain(name, param, survey)
    elif site.key not in joined:
      block = _block(site, biases.get(site.key), names, shapes)
      blocks.append(block)
      taps[site.key] = Tap(block.name, site, block.operator)
      if isinstance(block.operator, Kronecker):
        uses[block.name] = block.operator.uses(site.op.outputs[0].shape)
  return Plan(tuple(blocks), taps, survey.chains, uses, gradient_only)


def _block(
  site: Site, joining: tuple[Site, tuple[int, ...]] | None, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> Block:
  param, weight = site.weight.param, site.weight
  bias, axes = joining or (None, ())
  params = [param] if bias is None else [param, bias.weight.param]
  sizes = tuple(tuple(shapes[p]) for p in params)
  dtype = jnp.promote_types(site.op.outputs[0].dtype, jnp.float32)
  if site.linear is not None:
    bias_moves = None if bias is None else bias.weight.matrix_moves(axes)
    operator = Kronecker(site.linear, sizes[0], sizes[-1] if bias else (), bias_moves)
  else:
    moves = [weight.matrix_moves(weight.channels())]
    if bias is not None:
      moves.append(bias.weight.matrix_moves(axes))
    operator = Unit(site.kind == 'scale', sizes, tuple(moves), weight.channels())
  return Block(names[param], tuple(names[p] for p in params), operator, dtype)


def _check_fallbacks(fallback: Mapping[str, str], names: Sequence[str]) -> None:
  for pattern, choice in fallback.items():
    if choice not in FALLBACKS:
      raise CurvatureError(f'fallback {choice!r} for {pattern!r} is unknown; choose from {", ".join(FALLBACKS)}')
    if not any(fnmatch.fnmatch(name, pattern) for name in names):
      raise CurvatureError(f'fallback for {pattern!r} matches no parameter; there are {", ".join(names[:8])} ...')


def _complain(name: str, param: int, survey: Survey) -> None:
  choose = f"fallback={{{name!r}: 'diagonal'}} or 'gradient'"
  if param in survey.refusals:
    refusal = survey.refusals[param]
    raise CurvatureError(
      f'parameter {name!r} is used by {refusal.reason} at {refusal.line}, which is not understood; '
      f'change that, or pass {choose}'
    )
  raise CurvatureError(f'parameter {name!r} is never used by the loss; take it out of params, or pass {choose}')


def table(blocks: Sequence[Block], gradient_only: Mapping[str, str], sizes: Mapping[str, int]) -> str:
  """The coverage table: parameters, operator, factors as slots x n x n, and share of all parameters."""
  total = max(1, sum(sizes.values()))
  rows = [('parameters', 'operator', 'factors', 'share')]
  for block in blocks:
    stem = block.params[0].rpartition('/')[0]
    label = ' + '.join([block.params[0], *(p.removeprefix(f'{stem}/') for p in block.params[1:])])
    kind = 'diagonal (fallback)' if block.sampled_diagonal else block.operator.name
    factors = ', '.join(
      f'{name} {f.n}x{f.n}' if f.slots == 1 else f'{name} {f.slots} of {f.n}x{f.n}'
      for name, f in block.operator.factors.items()
    )
    rows.append((label, kind, factors, f'{sum(sizes[p] for p in block.params) / total:.1%}'))
  for name, reason in gradient_only.items():
    rows.append((name, f'gradient only ({reason})', '-', f'{sizes[name] / total:.1%}'))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])
