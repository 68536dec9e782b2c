"""Breaks lines of kron and parallel one at a time and counts how many of them `make test` notices.

python scripts/mutate.py --count=30 --seed=0

Each line is drawn with the same probability from those that compute or decide something, and one operator or number of
it is changed in a copy of the repository. The tests of its package run first, then all others, until one fails. The
table names the change and the test. The exit code is 3 if a change was not noticed.
"""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from kronmesh import files
from kronmesh.train.errors import RunError
from kronmesh.train.reporting.tables import columns

_COUNT = flags.DEFINE_integer('count', 30, 'How many lines.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Which lines, and how they are changed.')
_OUT = flags.DEFINE_string('out', None, 'A .txt file for the table.')

_CHANGED = {
  ast.Eq: ('==', '!='),
  ast.NotEq: ('!=', '=='),
  ast.Lt: ('<', '>='),
  ast.LtE: ('<=', '>'),
  ast.Gt: ('>', '<='),
  ast.GtE: ('>=', '<'),
  ast.In: ('in', 'not in'),
  ast.NotIn: ('not in', 'in'),
  ast.Is: ('is', 'is not'),
  ast.IsNot: ('is not', 'is'),
  ast.Add: ('+', '-'),
  ast.Sub: ('-', '+'),
  ast.Mult: ('*', '/'),
  ast.Div: ('/', '*'),
  ast.FloorDiv: ('//', '*'),
  ast.Mod: ('%', '//'),
  ast.MatMult: ('@', '-'),
}


class Change(NamedTuple):
  """One change of a source line. start, end: columns, in characters."""

  path: Path
  line: int
  start: int
  end: int
  old: str
  new: str

  def applied(self, text: str) -> str:
    lines = text.split('\n')
    line = lines[self.line - 1]
    assert line[self.start : self.end] == self.old, (self, line)  # noqa: S101  (positions are the parser's own)
    lines[self.line - 1] = line[: self.start] + self.new + line[self.end :]
    return '\n'.join(lines)


class Found(NamedTuple):
  """The result of one change. test: the first test that failed, '' for none."""

  change: Change
  test: str
  seconds: float


def changes(path: Path) -> dict[int, list[Change]]:
  """Returns the changes of each line that can be made in a file, none in annotations, messages or docstrings."""
  text = path.read_text()
  lines, changes_by_line = text.split('\n'), {}
  for node in _computing(ast.parse(text)):
    for change in _of_node(path, lines, node):
      changes_by_line.setdefault(change.line, []).append(change)
  return changes_by_line


def _computing(node: ast.AST) -> Iterator[ast.AST]:
  """Yields the nodes below, except those of annotations, decorators, error messages and imports."""
  if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
    return
  yield node
  for name, value in ast.iter_fields(node):
    if name in ('annotation', 'returns', 'decorator_list', 'type_params'):
      continue
    if isinstance(node, ast.keyword) and node.arg == 'strict':
      continue  # a check of lengths that are equal: no test can notice its absence
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.AST):
        yield from _computing(child)


def _of_node(path: Path, lines: list[str], node: ast.AST) -> Iterator[Change]:
  if isinstance(node, ast.Compare) and len(node.ops) == 1:
    yield from _between(path, lines, node.left, node.comparators[0], *_CHANGED[type(node.ops[0])])
  elif isinstance(node, ast.BinOp) and type(node.op) in _CHANGED:
    yield from _between(path, lines, node.left, node.right, *_CHANGED[type(node.op)])
  elif isinstance(node, ast.BoolOp):
    old, new = ('and', 'or') if isinstance(node.op, ast.And) else ('or', 'and')
    yield from _between(path, lines, node.values[0], node.values[1], old, new)
  elif isinstance(node, ast.Constant) and type(node.value) in (bool, int) and node.lineno == node.end_lineno:
    new = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
    old = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
    if old == str(node.value) and lines[node.lineno - 1].isascii():
      yield Change(path, node.lineno, node.col_offset, node.end_col_offset, old, new)
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and lines[node.lineno - 1].isascii():
    yield Change(path, node.lineno, node.col_offset, node.col_offset + 4, 'not ', '')


def _between(path: Path, lines: list[str], left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Change]:
  """Yields the change of an operator that stands between two expressions on one line."""
  if left.end_lineno != right.lineno or not lines[right.lineno - 1].isascii():
    return
  between = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
  places = [m.start() for m in re.finditer(re.escape(old), between)]
  if len(places) == 1:
    start = left.end_col_offset + places[0]
    yield Change(path, right.lineno, start, start + len(old), old, new)


def drawn(count: int, seed: int) -> list[Change]:
  """Draws `count` lines of kron and parallel, and a change of each."""
  rng = random.Random(seed)
  sources = sorted(p for package in ('kron', 'parallel') for p in (ROOT / 'src' / package).rglob('*.py'))
  by_line = [changes_of_line for path in sources for _, changes_of_line in sorted(changes(path).items())]
  return [rng.choice(changes_of_line) for changes_of_line in rng.sample(by_line, count)]


def tried(change: Change) -> Found:
  """Runs the tests on a copy of the repository with this change."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / 'repository'
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split('\0')[:-1]:
      (copy / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, copy / name)
    target = copy / change.path.relative_to(ROOT)
    target.write_text(change.applied(target.read_text()))
    (Path(folder) / 'path').mkdir()
    (Path(folder) / 'path' / 'kronmesh').symlink_to(copy / 'src')
    env = {**os.environ, 'PYTHONPATH': str(Path(folder) / 'path')}
    package = f'tests/{change.path.relative_to(ROOT / "src").parts[0]}'
    others = sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'tests').iterdir() if p.name != '__pycache__')
    for paths in ([package], [p for p in others if p != package and not p.endswith('test_package.py')]):
      command = [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '2', '-p', 'no:cacheprovider', '--no-header', *paths]
      done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
      if done.returncode:
        failed = re.search(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.MULTILINE)
        return Found(change, failed[1] if failed else f'code {done.returncode}', time.monotonic() - start)
  return Found(change, '', time.monotonic() - start)


def table(results: list[Found]) -> str:
  """Formats one row for each change, and a last line with the count."""
  rows = []
  for f in results:
    line = f.change.path.read_text().split('\n')[f.change.line - 1]
    where = f'{f.change.path.relative_to(ROOT / "src")}:{f.change.line}'
    changed = line[: f.change.start] + f'[{f.change.old} -> {f.change.new}]' + line[f.change.end :]
    rows.append((where, changed.strip()[:90], f.test.split('::')[-1][:70] or 'NOT NOTICED', f'{f.seconds:.0f}'))
  noticed = sum(bool(f.test) for f in results)
  return '\n'.join(
    [columns(('line', 'change', 'noticed by', 'seconds'), rows), '', f'{noticed} of {len(results)} noticed']
  )


def main() -> None:
  results = []
  for change in drawn(_COUNT.value, _SEED.value):
    results.append(tried(change))
    print(table(results[-1:]).splitlines()[2], flush=True)
  text = table(results)
  print(f'\n{text}')
  if _OUT.value:
    files.write(Path(_OUT.value), f'{text}\n')
  missed = [f for f in results if not f.test]
  if missed:
    raise RunError(f'{len(missed)} of {len(results)} changes were not noticed')


if __name__ == '__main__':
  launch.command(main, 'scripts/mutate.py --count=30 --seed=0')
