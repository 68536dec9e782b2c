"""Every public name is documented: what it does, its arguments and fields, what it returns and raises, and shapes."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
import typing
from pathlib import Path
from types import GenericAlias

import pytest

from scripts.site_hooks import PACKAGES, defined_in, public_names, source_of

ROOT = Path(__file__).parents[1]
NAMES = [(package, name) for package in PACKAGES for name in public_names(package)]
SECTIONS = ('Args', 'Attributes', 'Returns', 'Yields', 'Raises', 'Examples', 'References')
FEW = 2  # as many arguments may be described in the text, without a section


def the(package, name):
  return getattr(importlib.import_module(package), name)


def is_module_of_flax(value):
  return inspect.isclass(value) and any(base.__module__ == 'flax.linen.module' for base in value.__mro__)


def fields(value):
  """The names of what a named tuple, a dataclass or a module of flax holds."""
  if hasattr(value, '_fields'):
    return list(value._fields)
  if dataclasses.is_dataclass(value):
    return [
      f.name for f in dataclasses.fields(value) if f.name not in ('parent', 'name') or not is_module_of_flax(value)
    ]
  return []


def methods(value):
  """The functions that a class's own body defines and the site shows, by name."""
  for name, method in vars(value).items() if inspect.isclass(value) else ():
    function = getattr(method, '__func__', method)
    if inspect.isfunction(function) and not name.startswith('_') and inspect.getdoc(function):
      yield name, function


def section(text, title):
  """The names of a section's entries in their order; None if there is no such section."""
  body = re.search(rf'^{title}:\n((?:  .*\n?|\n)+)', text, re.MULTILINE)
  return re.findall(r'^  (\*{0,2}[\w.]+)(?=:)', body[1], re.MULTILINE) if body else None


def arguments(function):
  """The names of a function's arguments, as a docstring writes them."""
  stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
  there = inspect.signature(function).parameters.values()
  return [stars.get(p.kind, '') + p.name for p in there if p.name not in ('self', 'cls')]


def raised(function):
  """The errors that a function's own lines raise, by name."""
  tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Raise) and node.exc is not None:
      error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
      found.add(getattr(error, 'id', getattr(error, 'attr', '')))
  return {name for name in found if name[:1].isupper()}


def shapeless(annotations):
  """The names of arrays without a shape."""
  return [name for name, a in annotations.items() if re.search(r"\b(Array|ArrayLike|ndarray)\b(?!, ')", str(a))]


def complaints(function, text):
  """What the docstring of a public function or method lacks."""
  listed, names = section(text, 'Args'), arguments(function)
  if listed is None and len(names) > FEW:
    yield f'has no section for its arguments {names}'
  elif listed is not None and listed != names:
    yield f'lists the arguments {listed}, and takes {names}'
  for name in names:
    if not re.search(rf'(?<![\w*]){re.escape(name)}\b', text):
      yield f'does not say what {name!r} is'
  returns = inspect.signature(function).return_annotation
  says = r'\b([Rr]eturns?|[Yy]ields?|[Mm]akes?|[Bb]uilds?|[Rr]eads?|[Cc]hecks whether)\b'
  if returns not in (None, 'None') and not re.search(says, text):
    yield 'does not say what it returns'
  for error in sorted(raised(function)):
    if error not in (section(text, 'Raises') or ()) and not re.search(rf'^\w+s {error}\b', text):
      yield f'does not say that it raises {error}'
  for name in shapeless(inspect.get_annotations(function)):
    yield f'{name!r} is an array without a shape'


def beginning(text):
  """Whether the first line is a sentence with a verb: 'Returns ...', 'Holds ...'."""
  first = text.partition('\n')[0].strip()
  return re.match(r'[A-Z][a-z]+s\b', first) and first.endswith(('.', ':'))


def documented_below(package, name):
  """The string below an assignment, which the site shows for a table or another name of a type."""
  module, _, name = defined_in(package, name).rpartition('.')
  body = ast.parse(source_of(module).read_text()).body
  for node, after in itertools.pairwise(body):
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
    if name in [getattr(target, 'id', None) for target in targets] and isinstance(after, ast.Expr):
      return getattr(after.value, 'value', '')
  return ''


@pytest.mark.parametrize('package, name', NAMES)
def test_a_public_name_is_documented(package, name):
  value = the(package, name)
  if (not inspect.isfunction(value) and not inspect.isclass(value)) or isinstance(value, GenericAlias):
    assert beginning(documented_below(package, name)), f'{package}.{name} needs a string below its assignment'
    return
  text = inspect.getdoc(value) or ''
  assert inspect.getdoc(type(value)) != text, f'{package}.{name} has no docstring of its own'
  assert beginning(text), f'{package}.{name} needs a first line with a verb'
  assert not set(re.findall(r'^([A-Z]\w+):$', text, re.MULTILINE)) - set(SECTIONS), f'{package}.{name}: sections'
  if inspect.isfunction(value):
    assert not list(complaints(value, text)), f'{package}.{name}'
  of_methods = {method: list(complaints(f, inspect.getdoc(f))) for method, f in methods(value)}
  assert not {method: lacks for method, lacks in of_methods.items() if lacks}, f'{package}.{name}'
  assert not [method for method, f in methods(value) if not beginning(inspect.getdoc(f))], f'{package}.{name}'


@pytest.mark.parametrize('package, name', [(p, n) for p, n in NAMES if fields(the(p, n))])
def test_the_fields_of_a_public_class_are_documented(package, name):
  value = the(package, name)
  text = inspect.getdoc(value)
  assert section(text, 'Attributes') == fields(value), f'{package}.{name}'
  assert not shapeless({k: a for k, a in inspect.get_annotations(value).items() if k in fields(value)})
  if is_module_of_flax(value):
    unsaid = [n for n in arguments(value.__call__) if not re.search(rf'`[^`]*\b{n}\b', text)]
    assert not unsaid, f'{package}.{name} does not say what {unsaid} of its call are'
    assert re.search(r'\(b, ', text) and 'eturns' in text, f'{package}.{name}: the shapes of its call'
    assert not shapeless(inspect.get_annotations(value.__call__))
    for error in raised(value.__call__):
      assert error in (section(text, 'Raises') or ()), f'{package}.{name} does not say that it raises {error}'


@pytest.mark.parametrize('package, name', [(p, n) for p, n in NAMES if inspect.isclass(the(p, n))])
def test_what_a_public_class_is_made_from_is_documented(package, name):
  own = vars(the(package, name)).get('__init__')
  if inspect.isfunction(own) and not fields(the(package, name)) and not getattr(the(package, name), '_is_protocol', 0):
    text = inspect.getdoc(the(package, name))
    assert section(text, 'Args') == arguments(own), f'{package}.{name}'


@pytest.mark.parametrize('package, name', [(p, n) for p, n in NAMES if inspect.isfunction(the(p, n))])
def test_the_shapes_of_a_public_function_can_be_read(package, name):
  """jaxtyping refuses some shapes, such as '*n ...', only when they are read."""
  typing.get_type_hints(the(package, name))
