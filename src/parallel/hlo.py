"""The text of a compiled XLA program, parsed as far as an audit needs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {'pred': 8, 'bf16': 16}


class Typed(NamedTuple):
  """An array's type, such as 'f32' and (8, 16)."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    bits = _BITS.get(self.dtype) or int((re.search(r'\d+', self.dtype) or ['0'])[0])
    size = bits
    for n in self.shape:
      size *= n
    return -(-size // 8)

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


class Instruction(NamedTuple):
  """One line of a program: its operation, its result's arrays, the rest of the line, and its place in the source."""

  opcode: str
  arrays: tuple[Typed, ...]
  attributes: str
  source: str


class Program(NamedTuple):
  """Computations by name; `entry` names the one that runs first."""

  computations: dict[str, list[Instruction]]
  entry: str

  def walk(
    self, name: str | None = None, count: int = 1, exact: bool = True
  ) -> Iterator[tuple[Instruction, int, bool]]:
    """Yields every instruction that runs, how often it runs, and whether that number is exact."""
    for i in self.computations.get(name or self.entry, ()):
      yield i, count, exact
      times, known = count, exact
      if i.opcode == 'while':
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes)
        times, known = (count * int(trips[1]), exact) if trips else (count, False)
      for called in _called(i.attributes):
        yield from self.walk(called, times, known)


def parse(text: str) -> Program:
  """Parses the text from `compiled.as_text()`."""
  tables = {name: _table(text, name) for name in ('FileNames', 'FileLocations', 'StackFrames')}
  computations: dict[str, list[Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$', line)
    if header:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None:
      match = re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$', line)
      if match:
        current.append(Instruction(match[2], _arrays(match[1]), match[3], _source(match[3], tables)))
  return Program(computations, entry)


def _arrays(text: str) -> tuple[Typed, ...]:
  shapes = re.findall(r'([a-z]\w*)\[([\d,]*)\]', text)
  return tuple(Typed(dtype, tuple(int(n) for n in dims.split(',') if n)) for dtype, dims in shapes)


def _called(attributes: str) -> list[str]:
  """Returns the names of the computations that an instruction runs."""
  names = re.findall(r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)', attributes)
  for several in re.findall(r'branch_computations=\{([^}]*)\}', attributes):
    names += [name.strip().lstrip('%') for name in several.split(',')]
  return names


def _table(text: str, name: str) -> dict[int, str]:
  section = re.search(rf'^{name}\n((?:\d+ .*\n)*)', text, re.MULTILINE)
  rows = (line.partition(' ') for line in (section[1] if section else '').splitlines())
  return {int(number): rest for number, _, rest in rows}


def _source(attributes: str, tables: dict[str, dict[int, str]]) -> str:
  """Returns 'file.py:12' for the innermost frame outside of installed packages, or else for the innermost frame."""
  plain = re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes)
  if plain:
    return _short(plain[1], plain[2])
  named = re.search(r'stack_frame_id=(\d+)', attributes)
  frame, first = int(named[1]) if named else 0, ''
  while frame in tables['StackFrames']:
    numbers = dict(re.findall(r'(\w+)=(\d+)', tables['StackFrames'][frame]))
    location = dict(re.findall(r'(\w+)=(\d+)', tables['FileLocations'][int(numbers['file_location_id'])]))
    path = tables['FileNames'][int(location['file_name_id'])].strip('"')
    first = first or _short(path, location['line'])
    if 'site-packages' not in path:
      return _short(path, location['line'])
    parent = int(numbers.get('parent_frame_id', 0))
    if parent == frame:
      break
    frame = parent
  name = re.search(r'op_name="([^"/]+)"', attributes)  # an argument that is gathered before any use
  return first or (f'argument {name[1]}' if name else 'unknown')


def _short(path: str, line: str) -> str:
  return f'{"/".join(path.split("/")[-2:])}:{line}'
