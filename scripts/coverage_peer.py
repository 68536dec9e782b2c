"""Writes the second table of docs/coverage.md: verdicts on kronmesh and kfac-jax for the gallery's parameters.

python scripts/coverage_peer.py --out=docs/coverage.md

`scripts/peer_verdicts.py` says what is compared, and `src/train/kfac_jax_peer.py` how to install kfac-jax.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

from absl import app, flags, logging

from kronmesh.train import kfac_jax_peer
from scripts.peer_verdicts import BEGIN, END, look_at, row, rows_of, table
from tests.kron.gallery import GALLERY

_OUT = flags.DEFINE_string('out', None, 'The page between whose marks the table is written; printed without it.')
_COMMIT = flags.DEFINE_string(
  'commit', 'of an unknown commit', 'The commit of kfac-jax that is installed, for the page.'
)
_ONLY = flags.DEFINE_list('only', [], 'The architectures to look at, all without it; the rows of others stay.')
_EACH = flags.DEFINE_bool('each', False, 'Print the verdict on every parameter.')


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # kfac-jax logs every registration
  why = kfac_jax_peer.why_not()
  if why:
    sys.exit(f'error: {why}')
  page = Path(_OUT.value).read_text() if _OUT.value else f'{BEGIN}{END}'
  before = rows_of(page)
  rows = {}
  for name, make in GALLERY.items():
    if _ONLY.value and name not in _ONLY.value:
      rows |= {name: before[name]} if name in before else {}
      continue
    ours, other, frozen = look_at(make())
    rows[name] = row(name, ours, other, frozen)
    print(rows[name], flush=True)
    for parameter, verdict in ours.items() if _EACH.value else ():
      print(f'  {parameter}: {verdict}, {other[parameter]}')
  lines = table(rows)
  print(lines[-1])
  if _OUT.value:
    versions = ', '.join(f'{n} {importlib.metadata.version(n)}' for n in ('jax', 'flax', 'dm-haiku', 'equinox'))
    lines = [f'kfac-jax {_COMMIT.value}; {versions}.', '', *lines]
    above, below = page.split(BEGIN)[0], page.split(END)[1]
    Path(_OUT.value).write_text(f'{above}{BEGIN}\n' + '\n'.join(lines) + f'\n{END}{below}')


if __name__ == '__main__':
  app.run(main)
