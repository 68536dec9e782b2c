"""Sums of a pixel's window, written as Verilog: only the nonzero weights have wires.

In bit-planes a sum counts ones: full adders turn three bits of one weight into two, until two rows are left, which an
adder adds. With whole pixels, adders add them two by two. Registers stand after every few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

STEPS = 3  # of full adders between registers
ADDERS = 1  # adders between registers, where pixels are whole


class Term(NamedTuple):
  """A bit (or a word) of the window, `taps[place]` or its complement, that counts 2^weight times."""

  place: int
  weight: int
  negative: bool


class Sum(NamedTuple):
  """The text of one sum. result: its wire. width: bits of it. latency: registers from the taps to the result."""

  lines: list[str]
  result: str
  width: int
  latency: int


def digits(value: int) -> list[tuple[int, int]]:
  """Returns an integer as a sum of few powers of two: (exponent, 1 or -1), no two of which are neighbours."""
  found, exponent = [], 0
  while value:
    if value & 1:
      digit = 2 - (value & 3)
      found.append((exponent, digit))
      value -= digit
    value, exponent = value >> 1, exponent + 1
  return found


class _Namer:
  """Makes names of wires and registers that are unique in a module, and collects their lines."""

  def __init__(self, prefix: str) -> None:
    self.prefix, self.count = prefix, 0
    self.lines: list[str] = []

  def __call__(self, kind: str) -> str:
    self.count += 1
    return f'{self.prefix}_{kind}{self.count}'

  def registered(self, value: str, width: int) -> str:
    name = self('r')
    span = f'[{width - 1}:0] ' if width > 1 else ''
    self.lines.append(f'  reg {span}{name};\n  always @(posedge clk) {name} <= {value};')
    return name


def counted(prefix: str, terms: Sequence[Term], most: int) -> Sum:
  """Writes the sum of single bits. most: the largest value of the sum."""
  make, latency, width = _Namer(prefix), 0, max(1, most.bit_length())
  columns: list[list[str]] = [[] for _ in range(width + 1)]
  for term in terms:
    columns[term.weight].append(f'{"~" if term.negative else ""}taps[{term.place}]')
  steps = 0
  while max(map(len, columns)) > 2:
    if steps == STEPS:
      columns, latency, steps = [[make.registered(b, 1) for b in c] for c in columns], latency + 1, 0
    following: list[list[str]] = [[] for _ in columns]
    for i, bits in enumerate(columns):
      whole = len(bits) // 3 * 3
      for j in range(0, whole, 3):
        low, high = make('s'), make('c')
        make.lines.append(f'  wire {high}, {low};\n  assign {{{high}, {low}}} = full({", ".join(bits[j : j + 3])});')
        following[i].append(low)
        following[min(i + 1, width)].append(high)
      following[i] += bits[whole:]
    columns, steps = following, steps + 1
  # Bits above the width are zero: the sum cannot be that large.
  rows = [', '.join(c[k] if len(c) > k else "1'b0" for c in reversed(columns[:width])) for k in (0, 1)]
  both = any(len(c) > 1 for c in columns[:width])
  value = f'{{{rows[0]}}} + {{{rows[1]}}}' if both else f'{{{rows[0]}}}'
  return Sum(make.lines, make.registered(value, width), width, latency + 1)


def added(prefix: str, terms: Sequence[Term], bits: int, most: int) -> Sum:
  """Writes the sum of whole pixels of `bits` bits. most: the largest value of the sum."""
  make, latency, width = _Namer(prefix), 0, max(1, most.bit_length())
  words = [
    (f'{{{"~" if t.negative else ""}taps[{bits * t.place} +: {bits}]{f", {t.weight}{chr(39)}b0" if t.weight else ""}}}',
     (2**bits - 1) << t.weight)
    for t in sorted(terms, key=lambda t: t.weight)
  ]  # fmt: skip
  steps = 0
  while len(words) > 1:
    if steps == ADDERS:
      words, latency, steps = [(make.registered(w, m.bit_length()), m) for w, m in words], latency + 1, 0
    following = []
    for (a, m), (b, n) in zip(words[::2], words[1::2], strict=False):
      name, size = make('a'), (m + n).bit_length()
      make.lines.append(f'  wire [{size - 1}:0] {name} = {_wide(a, m, size)} + {_wide(b, n, size)};')
      following.append((name, m + n))
    words, steps = following + words[len(words) // 2 * 2 :], steps + 1
  value = words[0][0] if words else f"{width}'d0"
  return Sum(make.lines, make.registered(value, width), width, latency + 1)


def _wide(word: str, most: int, size: int) -> str:
  """Returns a word, of values up to `most`, with zeros before it."""
  return f"{{{size - most.bit_length()}'b0, {word}}}" if most.bit_length() < size else word


def module(name: str, sums: Sequence[Sum], notes: Sequence[str], taps: int) -> tuple[str, int]:
  """Writes a module that computes sums, all of one latency, and returns it with that latency.

  notes: what each sum is, for its comment. taps: the bits of the window.
  """
  latency = max(s.latency for s in sums)
  ports = [f'  output wire [{s.width - 1}:0] sum_{i}' for i, s in enumerate(sums)]
  lines = [
    f'module {name} (',
    '  input wire clk,',
    f'  input wire [{taps - 1}:0] taps,',
    ',\n'.join(ports),
    ');',
    '  function [1:0] full(input a, input b, input c);',
    '    full = {(a & b) | (a & c) | (b & c), a ^ b ^ c};',
    '  endfunction',
  ]
  for i, (s, note) in enumerate(zip(sums, notes, strict=True)):
    late = _Namer(f'd{i}')
    value = s.result
    for _ in range(latency - s.latency):
      value = late.registered(value, s.width)
    lines += ['', f'  // sum {i}: {note}', *s.lines, *late.lines, f'  assign sum_{i} = {value};']
  return '\n'.join([*lines, '', '  wire unused_taps = &taps;  // some weights are zero', 'endmodule', '']), latency
