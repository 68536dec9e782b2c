"""Hooks of mkdocs: they make the API pages from the packages' public names, and set formulas as MathML."""

from __future__ import annotations

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLONE = 'https://github.com/kronmesh/kronmesh'
SOURCE = f'{CLONE}/blob/main'
# The packages and modules whose public names are the API, with the title of each page.
PACKAGES = {
  'kronmesh.kron': 'kron: curvature and optimisers',
  'kronmesh.kron.observe': 'kron.observe: likelihoods',
  'kronmesh.parallel': 'parallel: meshes and placement',
  'kronmesh.models': 'models: networks',
  'kronmesh.edge': 'edge: ternary networks',
  'kronmesh.data': 'data: sets, films, graphs, batches',
  'kronmesh.train.settings.defaults': 'train.settings.defaults: configs',
  'kronmesh.train.build': 'train.build: runs',
  'kronmesh.train.loop': 'train.loop: training',
  'kronmesh.train.trained': 'train.trained: use a trained model',
  'kronmesh.train.checkpoints': 'train.checkpoints: exports',
  'kronmesh.train.errors': 'train.errors: errors and exit codes',
}
# The trainer's modules hold more than users call. These are the names that they do call.
_CALLED = {
  'kronmesh.train.build': ['build'],
  'kronmesh.train.loop': ['train'],
  'kronmesh.train.checkpoints': ['load_export'],
}


def source_of(package: str) -> Path:
  """Returns the file of a package or module."""
  path = ROOT / 'src' / Path(*package.split('.')[1:])
  return path / '__init__.py' if path.is_dir() else path.with_suffix('.py')


def public_names(package: str) -> list[str]:
  """Returns the names of `__all__`, or else the functions and classes of a module that are not private."""
  if package in _CALLED:
    return _CALLED[package]
  tree = ast.parse(source_of(package).read_text())
  for node in tree.body:
    if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
      return [name for name in ast.literal_eval(node.value) if name != 'observe']
  kinds = (ast.FunctionDef, ast.ClassDef)
  return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith('_')]


def defined_in(package: str, name: str) -> str:
  """Returns the full path at which a public name is defined, following the imports of the package."""
  path = source_of(package)
  parents = package.split('.') if path.name == '__init__.py' else package.split('.')[:-1]
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
      base = '.'.join(parents[: len(parents) - node.level + 1])
      return defined_in(f'{base}.{node.module}', name)
  return f'{package}.{name}'


def page_of(package: str, title: str) -> str:
  """Returns the markdown of a package's API page, with one directive for each public name."""
  short = package.removeprefix('kronmesh.')
  lines = [f'# {title}', '', f'```python\n{_import_line(package)}\n```', '']
  # Functions come first, then classes, then tables.
  for name in sorted(public_names(package), key=lambda n: (n.isupper(), n[0].isupper())):
    lines += [f'::: {defined_in(package, name)}', '    options:', f'      heading: {short}.{name}', '']
  return '\n'.join(lines)


def settings_page() -> str:
  """Returns the page of all settings of a config: the lines of `defaults()`, whose comments explain them."""
  text = source_of('kronmesh.train.settings.defaults').read_text()
  tree = ast.parse(text)
  (node,) = [node for node in tree.body if getattr(node, 'name', '') == 'defaults']
  lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
  words = [
    '# All settings of a config',
    '',
    'Every config starts from these values. Change one by `--config.NAME=VALUE`, or in a file of your own.',
    '`kronmesh configs NAME` shows the values of a packaged config.',
    '',
  ]
  return '\n'.join([*words, '```python', *lines, '```', ''])


def _import_line(package: str) -> str:
  parent, _, name = package.rpartition('.')
  return f'from {parent} import {name}'


def formulas_as_mathml(html: str) -> str:
  """Replaces the formulas that pymdownx.arithmatex has marked, by MathML, which browsers set without a script."""
  from latex2mathml.converter import convert

  def inline(match: re.Match) -> str:
    return convert(unescape(match[1]))

  def block(match: re.Match) -> str:
    return f'<div class="formula">{convert(unescape(match[1]), display="block")}</div>'

  html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.DOTALL)
  return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, html, flags=re.DOTALL)


def on_config(config: Any) -> Any:
  """Shows the folder src/ to mkdocstrings under the name of the package."""
  link = ROOT / 'build/site/kronmesh'
  link.parent.mkdir(parents=True, exist_ok=True)
  if not link.is_symlink():
    link.symlink_to(ROOT / 'src')
  return config


def on_files(files: Any, config: Any) -> Any:
  """Adds the API pages, and the pages of the repository's root, to the site."""
  from mkdocs.structure.files import File

  for package, title in PACKAGES.items():
    name = package.removeprefix('kronmesh.')
    files.append(File.generated(config, f'api/{name}.md', content=page_of(package, title)))
  files.append(File.generated(config, 'api/settings.md', content=settings_page()))
  for name in ('CHANGELOG.md', 'CONTRIBUTING.md'):
    files.append(
      File.generated(config, f'project/{name.lower()}', content=(ROOT / name).read_text().replace('](docs/', '](../'))
    )
  return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
  """Says at the top of a page with commands from scripts/ that they need a clone of the repository."""
  del rest
  if page.file.src_uri.startswith(('api/', 'project/')) or not re.search(r'(python|^|\s)\s?scripts/\w', markdown):
    return markdown
  title, _, text = markdown.partition('\n')
  return (
    f'{title}\n\n!!! note\n    Commands with `scripts/` need a clone of the repository: `git clone {CLONE}`\n{text}'
  )


def on_page_content(html: str, page: Any, **rest: Any) -> str:
  """Sets the formulas of a page, and turns links of notebooks to other notebooks and pages into links of the site."""
  del rest
  if page.file.src_uri.endswith('.ipynb'):
    html = re.sub(r'href="(\w+)\.ipynb"', r'href="../\1/"', html)
    html = re.sub(rf'href="{SOURCE}/docs/([\w/]+)\.md"', r'href="../../\1/"', html)
  return formulas_as_mathml(html)
