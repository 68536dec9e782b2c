"""What is installed is what is there, and packages import each other one way."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / 'src').rglob('*.py'))


def test_setup_names_every_package():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  listed = set(config['options']['packages'].split())
  there = {'.'.join(('kronmesh', *path.parent.relative_to(ROOT / 'src').parts)) for path in SOURCES}
  assert there == listed


def imports(path):
  """(level, module) of every import. `from .. import files` imports the module `files` of level 2."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      yield node.level, node.module
    elif isinstance(node, ast.Import | ast.ImportFrom):
      yield from ((getattr(node, 'level', 0), alias.name) for alias in node.names)


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT / 'src')))
def test_imports_go_one_way(path):
  inside = path.relative_to(ROOT / 'src').parts
  for level, module in imports(path):
    top = module.split('.')[0]
    below = {'data': 'files', 'kron': 'program', 'models': 'program', 'parallel': 'program'}.get(inside[0])
    outward = level == len(inside) and top == below
    assert level < len(inside) or outward, f'{path}: reaches out of {inside[0]} by {"." * level}{module}'
    assert level or top not in ('kronmesh', 'experiments', 'scripts', 'tests', 'tensorflow'), f'{path}: {module}'
    if inside[0] in ('kron', 'program') and not level:
      assert top not in ('flax', 'ml_collections', 'absl', 'tensorflow_datasets', 'grain'), f'{path}: {module}'


def test_only_one_package_touches_jax_internals():
  """`jax.core`, `jax._src`, `jax.extend` and `jax.interpreters`: src/program alone, `jax._src` nowhere."""
  inner = ('jax.core', 'jax._src', 'jax.extend', 'jax.interpreters')
  found = {p for p in SOURCES if any(m.startswith(inner) for _, m in imports(p)) or 'jax.core.' in p.read_text()}
  assert {path.parent.relative_to(ROOT) for path in found} == {Path('src/program')}
  assert not [path for path in SOURCES if 'jax._src' in path.read_text()]
