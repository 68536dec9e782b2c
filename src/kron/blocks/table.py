"""The coverage table that `print(curvature)` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from ..operators import Unitwise
from .block import Block


def table(
  blocks: Sequence[Block], gradient_only: Mapping[str, str], regularised: Sequence[str], sizes: Mapping[str, int]
) -> str:
  """Lists each block's parameters, operator, factors, bytes, share of all parameters and added flops per step."""
  total = max(1, sum(sizes.values()))
  rows = [('parameters', 'operator', 'factors', 'bytes', 'share', 'flops')]
  all_bytes = 0
  for block in blocks:
    stem = block.params[0].rpartition('/')[0]
    label = ' + '.join([block.name, *(p.removeprefix(f'{stem}/') for p in block.params[1:])])
    factors = block.operator.factors
    size = sum(f.rows * f.n**2 for f in factors.values()) * jnp.dtype(block.dtype).itemsize
    all_bytes += size
    # No share is shown for a block that holds only some entries of its parameters.
    share = '-' if block.partial else f'{sum(sizes[p] for p in block.params) / total:.1%}'
    text = ', '.join(f'{name} {f}' for name, f in factors.items())
    rows.append((label, _operator(block), text, _short(size), share, _short(block.flops) if block.flops else '-'))
  for name, reason in gradient_only.items():
    rows.append((name, f'gradient only ({reason})', '-', '-', f'{sizes[name] / total:.1%}', '-'))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
  lines = [lines[0], '-' * len(lines[0]), *lines[1:]]
  flops = sum(block.flops for block in blocks)
  lines.append(f'factors take {_short(all_bytes)}B; their statistics add {_short(flops)} flops')
  if regularised:
    lines.append(f'with terms of their own in the loss: {", ".join(regularised)}')
  return '\n'.join(lines)


def _operator(block: Block) -> str:
  notes = []
  if block.sampled_diagonal:
    return 'diagonal (fallback)'
  if block.operator.transposed:
    notes.append('also transposed')
  if isinstance(block.operator, Unitwise):
    notes.append('diagonal' if block.operator.diagonal else 'unit-wise')
  if block.operator.reduced is not None:
    notes.append('reduce')
  if block.whole_batch:
    notes.append('of the whole batch')
  return block.operator.name + (f' ({", ".join(notes)})' if notes else '')


def _short(number: float) -> str:
  for unit in ('', 'k', 'M', 'G', 'T'):
    if number < 1000 or unit == 'T':
      return f'{number:.3g}{unit}'
    number /= 1000
  return str(number)
