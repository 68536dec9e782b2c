"""Writes the table of docs/coverage.md: kron's blocks for every architecture of tests/kron/gallery.py.

python scripts/coverage_page.py --out=docs/coverage.md

A row has the blocks by operator, the share of parameters with a block, and the largest error of the factors against the
reference that unrolls the program (tests/kron/unrolled.py). If kron refuses the program, the row shows the reason.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import jax
from absl import app, flags

from kronmesh import kron
from tests.kron.gallery import GALLERY, Case
from tests.kron.unrolled import errors

_OUT = flags.DEFINE_string('out', None, 'The page between whose marks the table is written; printed without it.')
BEGIN, END = '<!-- table -->', '<!-- end -->'


def row(name: str, case: Case) -> str:
  try:
    curvature = kron.curvature(case.loss, case.params, *case.args, fisher='empirical')
  except kron.CurvatureError as error:
    return f'| {name} | {case.framework} | refused | - | {str(error).split(";")[0]} |'
  sizes = {
    k: v for k, v in zip(kron.param_names(case.params), (p.size for p in jax.tree.leaves(case.params)), strict=True)
  }
  covered = sum(n for k, n in sizes.items() if k not in curvature.gradient_only) / sum(sizes.values())
  kinds = collections.Counter(block.operator.name for block in curvature.blocks)
  worst = max(errors(curvature, case.loss, case.params, case.args, case.examples, case.state).values())
  text = ', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))
  frozen = f' ({len(curvature.gradient_only)} frozen)' if curvature.gradient_only else ''
  return f'| {name} | {case.framework} | {text} | {covered:.0%}{frozen} | {worst:.0e} |'


def main(argv: list[str]) -> None:
  del argv
  rows = ['| architecture | written in | blocks | parameters | largest error |', '|---|---|---|---|---|']
  for name, make in GALLERY.items():
    rows.append(row(name, make()))
    print(rows[-1], flush=True)
  if _OUT.value:
    page = Path(_OUT.value)
    before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
    page.write_text(f'{before}{BEGIN}\n' + '\n'.join(rows) + f'\n{END}{after}')


if __name__ == '__main__':
  app.run(main)
