"""The notebooks run from top to bottom, and what they store is what they say."""

import ast
import base64
import json
import os
import re
import struct
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'docs/notebooks'
NAMES = ('own_loop', 'coverage', 'pinn', 'mesh', 'transformer')
PALETTE = {'#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00'}
LOCAL = re.compile(r'/(work|tmp|home|root|Users|usr|opt)\b|ipykernel_|site-packages')
LARGEST = 400_000  # bytes of a notebook
NARROWEST = 800  # pixels of a picture


def read(path):
  return json.loads(path.read_text())


def source(cell):
  return ''.join(cell['source'])


def code_cells(notebook):
  return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def text_of(output):
  """Returns what an output shows as text."""
  data = output.get('data', {})
  shown = [output.get('text', '')] + [data[kind] for kind in data if kind.startswith('text/')]
  return '\n'.join(''.join(lines) for lines in shown)


def pictures(cell):
  """Returns the widths in pixels of a cell's pictures."""
  stored = [o['data']['image/png'] for o in cell['outputs'] if 'image/png' in o.get('data', {})]
  headers = [base64.b64decode(''.join(png))[:24] for png in stored]
  assert all(header.startswith(b'\x89PNG') for header in headers)
  return [struct.unpack('>I', header[16:20])[0] for header in headers]


def names_called(nodes):
  """Returns the names of the functions that statements call when they run, those of nested functions left out."""
  called, left = set(), list(nodes)
  while left:
    node = left.pop()
    if isinstance(node, ast.FunctionDef | ast.Lambda):
      continue
    if isinstance(node, ast.Call):
      called.add(node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, 'attr', ''))
    left += ast.iter_child_nodes(node)
  return called


def check(notebook):
  """Checks that the cells ran in order without an error, that they show what they print and draw, and the claims."""
  cells = code_cells(notebook)
  assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
  printing = {'print'}
  for cell in cells[1:]:  # the first one installs
    where = source(cell)[:60]
    body = ast.parse(source(cell)).body
    for function in (node for node in body if isinstance(node, ast.FunctionDef)):
      if names_called(function.body) & printing:
        printing.add(function.name)
    called = names_called(body)
    assert not any(o['output_type'] == 'error' for o in cell['outputs']), where
    assert not any(o.get('name') == 'stderr' for o in cell['outputs']), where
    if called & printing:
      assert any(text_of(o).strip() for o in cell['outputs']), f'nothing printed by {where}'
    drawn = pictures(cell)
    assert bool(drawn) == ('subplots' in called), f'picture of {where}'
    assert all(width >= NARROWEST for width in drawn), f'{drawn} pixels by {where}'
    for output in cell['outputs']:
      assert not LOCAL.search(text_of(output)), f'{LOCAL.search(text_of(output))} in the output of {where}'
  claims = ''.join(text_of(o) for o in cells[-1]['outputs']).strip().splitlines()
  assert len(claims) >= 3
  assert not [claim for claim in claims if not claim.startswith('yes ')]


def test_all_notebooks_are_tested():
  assert {path.stem for path in FOLDER.glob('*.ipynb')} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_stores_its_outputs(name):
  path = FOLDER / f'{name}.ipynb'
  assert path.stat().st_size < LARGEST
  check(read(path))


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_installs_first_and_opens_in_colab(name):
  notebook = read(FOLDER / f'{name}.ipynb')
  first = source(notebook['cells'][0]).splitlines()
  assert first[0] == 'try:' and 'import kronmesh' in first[1]
  assert first[2:] == ['except ImportError:', '  %pip install -q kronmesh']
  assert notebook['cells'][0]['outputs'] == []
  pages = [source(cell) for cell in notebook['cells'] if cell['cell_type'] == 'markdown']
  link = f'https://colab.research.google.com/github/kronmesh/kronmesh/blob/main/docs/notebooks/{name}.ipynb'
  badge = 'https://colab.research.google.com/assets/colab-badge.svg'
  assert f'[![Open in Colab]({badge})]({link})' in pages[0]
  text = '\n'.join(source(cell) for cell in notebook['cells'])
  assert set(re.findall(r'#[0-9A-F]{6}\b', text)) <= PALETTE
  for target in re.findall(r'\]\((\w+\.ipynb)\)', text):
    assert (FOLDER / target).exists(), target
  for target in re.findall(r'blob/main/([\w/]+\.md)', text) + re.findall(r'`(experiments/[\w/]+\.py)`', text):
    assert (FOLDER.parents[1] / target).exists(), target


@pytest.mark.long
@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_runs(name, tmp_path):
  import nbclient
  import nbformat

  notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
  for cell in code_cells(notebook):
    cell['outputs'], cell['execution_count'] = [], None
  settings = {'timeout': 1200, 'kernel_name': 'python3', 'resources': {'metadata': {'path': str(tmp_path)}}}
  # The notebook runs as its readers run it, without the flags of the tests.
  env = {key: value for key, value in os.environ.items() if not key.startswith(('JAX_', 'XLA_'))}
  nbclient.NotebookClient(notebook, **settings).execute(env=env)
  nbformat.write(notebook, tmp_path / f'{name}.ipynb')
  check(read(tmp_path / f'{name}.ipynb'))
