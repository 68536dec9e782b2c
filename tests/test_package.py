"""What is installed is what is there, and modules import each other one way, functions' imports counted too."""

import ast
import configparser
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / 'src').rglob('*.py'))
PACKAGE = 'kronmesh'

# What each package may import of ours, beside itself.
ARROWS = {
  'extras': set(),
  'program': set(),
  'files': set(),
  'kron': {'program'},
  'parallel': {'extras', 'program'},
  'edge': {'files'},
  'models': {'edge', 'extras', 'program'},
  'data': {'extras', 'files'},
  'train': {'data', 'edge', 'extras', 'files', 'kron', 'models', 'parallel', 'program'},
  'tasks': {'data', 'edge', 'extras', 'files', 'kron', 'models', 'parallel', 'train'},
  'commands': {'edge', 'extras', 'files', 'tasks', 'train'},
  '__main__': {'commands'},
}
# The storeys of a package, from the ground: a module imports from its own storey and from those below. What is in none
# stands on the storey of None.
STOREYS = {
  'kron': (
    {'errors', 'explicit', 'param_trees', 'placing', 'statistics', 'trees', 'uses'},
    {'operators'},
    {'observe', 'products'},
    {'reading'},
    {'measuring'},
    {'blocks'},
    {'backward', 'curvature'},
    {'state'},
    {'optimizers'},
  ),
  'train': (
    {'errors', 'jsonfile'},
    {'settings'},
    {'runtime'},
    {'reporting'},
    None,
    {'planning'},
    {'loop', 'faults', 'watchers'},
    {'sweeps'},
  ),
}
HEAVY = ('flax', 'ml_collections', 'absl', 'tensorflow_datasets', 'grain')  # what `kron` does without


def name_of(path: Path) -> str:
  parts = path.relative_to(ROOT / 'src').with_suffix('').parts
  return '.'.join((PACKAGE, *(parts[:-1] if parts[-1] == '__init__' else parts)))


MODULES = {name_of(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
  """The absolute names of all modules that a file imports, wherever it does so."""
  own = name_of(path).split('.')
  package = own if path.name == '__init__.py' else own[:-1]
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      base = '.'.join([*base, *([node.module] if node.module else [])])
      for alias in node.names:
        full = f'{base}.{alias.name}'
        found.add(full if full in MODULES else base)
  return found


def storey(package: str, module: str) -> int:
  levels = STOREYS[package]
  named = next((i for i, names in enumerate(levels) if names and module in names), None)
  return levels.index(None) if named is None else named


def test_setup_names_every_package():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  listed = set(config['options']['packages'].split())
  there = {'.'.join((PACKAGE, *path.parent.relative_to(ROOT / 'src').parts)) for path in SOURCES} | {'kronmesh.configs'}
  assert there == listed


@pytest.mark.parametrize('name', MODULES)
def test_arrows_point_one_way(name):
  path = MODULES[name]
  assert not any(isinstance(n, ast.ImportFrom) and not n.level and (n.module or '').split('.')[0] == PACKAGE
                 for n in ast.walk(ast.parse(path.read_text()))), f'{path}: import our own modules by dots'  # fmt: skip
  if name == PACKAGE:
    return
  own = name.split('.')[1:]
  for imported in sorted(imports(path)):
    first, *rest = imported.split('.')
    assert first not in ('experiments', 'scripts', 'tests', 'tensorflow'), f'{name} -> {imported}'
    assert own[0] not in ('kron', 'parallel', 'program', 'extras') or first not in HEAVY, f'{name} -> {imported}'
    if first != PACKAGE or not rest:
      continue
    assert rest[0] == own[0] or rest[0] in ARROWS[own[0]], f'{name} -> {imported}: {own[0]} may not import {rest[0]}'
    if rest[0] == own[0] in STOREYS and len(rest) > 1 and len(own) > 1:
      below, above = storey(own[0], rest[1]), storey(own[0], own[1])
      assert below <= above, f'{name} -> {imported}: {own[1]} stands below {rest[1]}'


def test_there_is_no_circle():
  graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items() if path.name != '__init__.py'}
  try:
    list(graphlib.TopologicalSorter(graph).static_order())
  except graphlib.CycleError as error:
    raise AssertionError(f'modules import each other in a circle: {" -> ".join(error.args[1])}') from None


def test_only_one_package_touches_jax_internals():
  """`jax.core`, `jax._src`, `jax.extend` and `jax.interpreters`: src/program alone, `jax._src` nowhere."""
  inner = ('jax.core', 'jax._src', 'jax.extend', 'jax.interpreters')
  found = {p for p in SOURCES if any(m.startswith(inner) for m in imports(p)) or 'jax.core.' in p.read_text()}
  assert {path.parent.relative_to(ROOT) for path in found} == {Path('src/program')}, found
  assert not [path for path in SOURCES if 'jax._src' in path.read_text()]
