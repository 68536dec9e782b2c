"""One layer as a Verilog module: windows, sums, levels, and what is added and pooled; and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..activations import top
from ..layers import Conv, Head, Numbers
from . import sums
from .sums import Term
from .thresholds import Channel, as_tree, channels, columns, constant, level_bits

SERIAL, PARALLEL = 'serial', 'parallel'
SLACK = 8  # beats on their way between a layer and its queue


# Beside the sums of bit-planes, which are there one cycle after `finished`.
_PIXEL_VALID = ('  reg pixel_valid;', '  always @(posedge clk) pixel_valid <= ~rst & finished;')


class Stream(NamedTuple):
  """A stream of pixels. bits: of a channel. serial: whether a pixel comes as `bits` bit-planes, or in one beat."""

  rows: int
  columns: int
  channels: int
  bits: int
  serial: bool

  @property
  def bus(self) -> int:
    """Returns the bits of a beat."""
    return self.channels * (1 if self.serial else self.bits)

  @property
  def beats(self) -> int:
    """Returns the beats of a pixel."""
    return self.bits if self.serial else 1


class Module(NamedTuple):
  """A written module.

  files: its text and that of its sums, by file name. read, out: its streams. spare: the most beats that follow after it
    was told to stop.
  """

  name: str
  files: dict[str, str]
  read: Stream
  out: Stream
  spare: int


class Counts(NamedTuple):
  """The written sums of a layer. widths: the bits of each sum. latency: registers from the window to the sums."""

  text: str
  widths: tuple[int, ...]
  latency: int


def conv_layer(name: str, conv: Conv, numbers: Numbers, stream: Stream) -> Module:
  """Writes a layer that reads `stream`, bit by bit if that is serial, else a whole pixel each cycle."""
  rows, across = (-(-n // conv.stride) for n in (stream.rows, stream.columns))
  out = Stream(rows, across, conv.width, conv.bits, stream.serial)
  bits, found = level_bits(conv), channels(conv, numbers, stream.bits)
  terms = [_terms(numbers.weights, conv, o, stream.channels) for o in range(conv.width)]
  counts = _counts(f'{name}_sums', terms, stream, conv.kernel**2)
  body = [
    _ports(name, stream, out, conv.add is not None),
    _window(stream, conv.kernel, conv.stride, max(stream.beats, bits) if stream.serial else 1),
    _use(f'{name}_sums', counts, stream.serial),
    _sums_of_pixels(counts, [c.width for c in found], stream.serial),
    _levels(found, bits, stream.serial),
  ]
  values = 'levels'
  if conv.add is not None:
    body.append(_added(out))
    values = 'added'
  if conv.pool > 1:
    body.append(_pooled(out, conv.pool, values))
    out = out._replace(rows=rows // conv.pool, columns=across // conv.pool)
    values = 'pooled'
  body += [f'  assign out_data = {values};', f'  assign out_valid = {values}_valid;', 'endmodule', '']
  spare = counts.latency + 2 * bits + (2 * conv.bits if conv.add is not None else 0) + SLACK
  return Module(name, {f'{name}.v': '\n'.join(body), f'{name}_sums.v': counts.text}, stream, out, spare)


def head_layer(name: str, head: Head, stream: Stream, by_place: bool) -> Module:
  """Writes the head: sums of all channels, over all places or at each one, as two's complement."""
  weights = np.asarray(head.weights, int)
  terms = [
    [Term(c, e, d < 0) for c, w in enumerate(weights[:, o]) for e, d in sums.digits(int(w))]
    for o in range(weights.shape[1])
  ]
  counts = _counts(f'{name}_sums', terms, stream, 1)
  places = 1 if by_place else stream.rows * stream.columns
  unit = top(stream.bits)
  most = [sum(1 << t.weight for t in ts) * unit for ts in terms]
  widths = [max(1, m.bit_length()) for m in most]
  too_much = [sum(1 << t.weight for t in ts if t.negative) * unit * places for ts in terms]
  start = [int(o) - n for o, n in zip(head.offset, too_much, strict=True)]
  reach = max(max(abs(s), abs(s + places * m)) for s, m in zip(start, most, strict=True))
  width, total = max(widths), max(max(widths), reach.bit_length()) + 1
  shape = (stream.rows, stream.columns) if by_place else (1, 1)
  out = Stream(*shape, len(terms), total, False)
  wide = [f"{{{width - w}'b0, sum_{i}}}" if w < width else f'sum_{i}' for i, w in enumerate(widths)]
  body = [
    _ports(name, stream, out, False),
    _window(stream, 1, 1, stream.beats),
    _use(f'{name}_sums', counts, stream.serial),
    _sums_of_pixels(counts, widths, stream.serial),
    *_PIXEL_VALID[: 2 * stream.serial],
    f'  totals #(.OUTPUTS({len(terms)}), .IN({width}), .OUT({total}), .PLACES({places}),',
    f'    .START({constant([s % (1 << total) for s in start], total)})) totals (',
    f'    .clk(clk), .rst(rst), .in_valid({"pixel_valid" if stream.serial else "finished"}),',
    f'    .in_data({{{", ".join(reversed(wide))}}}), .out_valid(out_valid), .out_data(out_data));',
    'endmodule',
    '',
  ]
  return Module(
    name, {f'{name}.v': '\n'.join(body), f'{name}_sums.v': counts.text}, stream, out, counts.latency + SLACK
  )


def _terms(weights: np.ndarray, conv: Conv, output: int, inputs: int) -> list[Term]:
  """Returns a channel's terms: where its nonzero weights lie in the window, and their signs."""
  found = []
  for a, b, c in np.argwhere(weights[..., output]):
    channel = output if conv.depthwise else int(c)
    found.append(Term((int(a) * conv.kernel + int(b)) * inputs + channel, 0, bool(weights[a, b, c, output] < 0)))
  return found


def _counts(name: str, terms: Sequence[Sequence[Term]], stream: Stream, pixels: int) -> Counts:
  """Writes the module of a layer's sums: of a bit-plane, or of whole pixels."""
  written, notes = [], []
  for i, ts in enumerate(terms):
    most = sum(1 << t.weight for t in ts)
    if stream.serial:
      written.append(sums.counted(f's{i}', ts, most))
    else:
      written.append(sums.added(f's{i}', ts, stream.bits, most * top(stream.bits)))
    minus = sum(t.negative for t in ts)
    notes.append(f'{len(ts) - minus} terms, less {minus}')
  text, latency = sums.module(name, written, notes, pixels * stream.bus)
  return Counts(text, tuple(s.width for s in written), latency)


def _ports(name: str, stream: Stream, out: Stream, adds: bool) -> str:
  earlier = f'\n  input wire [{out.channels * out.bits - 1}:0] earlier,\n  output wire take_earlier,' if adds else ''
  sizes = f'{stream.channels} channels of {stream.rows} x {stream.columns} pixels, {stream.bits} bits'
  how = 'in bit-planes' if stream.serial else 'a pixel each cycle'
  return f"""// From {sizes}, {how}, to {out.channels} channels.
module {name} (
  input wire clk,
  input wire rst,
  input wire [{stream.bus - 1}:0] in_data,
  input wire in_valid,
  output wire in_ready,
  input wire room,{earlier}
  output wire [{out.bus - 1}:0] out_data,
  output wire out_valid
);"""


def _window(stream: Stream, kernel: int, stride: int, period: int) -> str:
  sizes = f'.WIDTH({stream.bus}), .BEATS({stream.beats}), .COLUMNS({stream.columns}), .ROWS({stream.rows})'
  return f"""  wire valid, last;
  wire [{kernel * kernel * stream.bus - 1}:0] taps;
  window #({sizes}, .K({kernel}), .STRIDE({stride}), .PERIOD({period})) window (
    .clk(clk), .rst(rst), .in_data(in_data), .in_valid(in_valid), .in_ready(in_ready), .room(room),
    .out_valid(valid), .out_last(last), .taps(taps));"""


def _use(name: str, counts: Counts, serial: bool) -> str:
  """Writes the use of the sums, and `counted` and `finished`: whether they are those of a beat, and of a last one."""
  declared = '\n'.join(f'  wire [{w - 1}:0] count_{i};' for i, w in enumerate(counts.widths))
  ports = ',\n    '.join(f'.sum_{i}(count_{i})' for i in range(len(counts.widths)))
  counted = f"""  wire counted;
  delay #(.CYCLES({counts.latency})) beside_counts (.clk(clk), .rst(rst), .in(valid), .out(counted));
  reg clear;
  always @(posedge clk) clear <= rst | nearly;
"""
  nearly = '  wire nearly = valid & last;'
  if counts.latency > 1:
    nearly = f"""  wire nearly;  // one cycle before `finished`
  delay #(.CYCLES({counts.latency - 1})) almost_last (.clk(clk), .rst(rst), .in(valid & last), .out(nearly));"""
  return f"""{declared}
  {name} counts (
    .clk(clk), .taps(taps),
    {ports});
{nearly}
{counted if serial else ''}  wire finished;
  delay #(.CYCLES(1)) last_of_counts (.clk(clk), .rst(rst), .in(nearly), .out(finished));"""


def _sums_of_pixels(counts: Counts, widths: Sequence[int], serial: bool) -> str:
  """Writes `sum_i`, a channel's sum over a whole pixel, which is there from the cycle after `finished` on."""
  lines = []
  for i, (narrow, wide) in enumerate(zip(counts.widths, widths, strict=True)):
    more = f"{{{wide - narrow}'b0, count_{i}}}" if wide > narrow else f'count_{i}'
    lines.append(f'  wire [{wide - 1}:0] sum_{i};')
    if serial:
      ports = f'.clk(clk), .clear(clear), .valid(counted), .last(finished), .count({more}), .sum(sum_{i})'
      lines.append(f'  accumulate #(.WIDTH({wide})) accumulate_{i} ({ports});')
    else:
      lines.append(f'  assign sum_{i} = {more};')
  return '\n'.join(lines)


def _levels(found: Sequence[Channel], bits: int, serial: bool) -> str:
  """Writes `levels`: the bits of all channels' levels, or whole levels."""
  count = len(found)
  lines = [f'  wire [{count * (1 if serial else bits) - 1}:0] levels;', '  wire levels_valid;']
  for i, channel in enumerate(found):
    tree = columns(as_tree(channel.thresholds), channel.width)
    settings = f'.SUM({channel.width}), .BITS({bits}), .THRESHOLDS({tree})'
    if serial:
      ports = f'.clk(clk), .start(finished), .sum(sum_{i}), .level(levels[{i}])'
      lines.append(f'  search #({settings}) search_{i} ({ports});')
    else:
      ports = f'.clk(clk), .sum(sum_{i}), .level(levels[{bits * i} +: {bits}])'
      lines.append(f'  search_parallel #({settings}) search_{i} ({ports});')
  if serial:
    lines += [
      f'  wire [{bits}:0] searching;  // one bit for each cycle of the search',
      '  assign searching[0] = finished;',
      '  genvar g;',
      f'  generate for (g = 0; g < {bits}; g = g + 1) begin : steps',
      '    delay #(.CYCLES(1)) step (.clk(clk), .rst(rst), .in(searching[g]), .out(searching[g+1]));',
      '  end endgenerate',
      f'  delay #(.CYCLES(1)) beside_levels (.clk(clk), .rst(rst), .in(|searching[{bits}:1]), .out(levels_valid));',
    ]
  else:
    lines.append(f'  delay #(.CYCLES({bits})) beside_levels (.clk(clk), .rst(rst), .in(finished), .out(levels_valid));')
  return '\n'.join(lines)


def _added(out: Stream) -> str:
  """Writes `added`: the levels and an earlier stream's pixel, clipped."""
  wide = out.channels * (out.bits + 1)
  whole = f"""  wire [{wide - 1}:0] whole;
  wire whole_valid;"""
  adder = f"""  wire [{out.channels * out.bits - 1}:0] both;
  wire both_valid;
  add #(.WIDTH({out.channels}), .BITS({out.bits})) add (
    .clk(clk), .rst(rst), .in_data(whole), .in_valid(whole_valid), .earlier(earlier), .take(take_earlier),
    .out_data(both), .out_valid(both_valid));"""
  if not out.serial:
    ends = '  assign whole = levels;\n  assign whole_valid = levels_valid;'
    after = f'  wire [{out.bus - 1}:0] added = both;\n  wire added_valid = both_valid;'
    return '\n'.join([whole, ends, adder, after])
  collect = f"""  wire unused_words_ready, unused_planes_ready;
  words #(.WIDTH({out.channels}), .BITS({out.bits + 1})) words (
    .clk(clk), .rst(rst), .in_data(levels), .in_valid(levels_valid), .in_ready(unused_words_ready),
    .out_data(whole), .out_valid(whole_valid), .out_ready(1'b1));"""
  after = f"""  wire [{out.bus - 1}:0] added;
  wire added_valid;
  planes #(.WIDTH({out.channels}), .BITS({out.bits})) planes (
    .clk(clk), .rst(rst), .in_data(both), .in_valid(both_valid), .in_ready(unused_planes_ready),
    .out_data(added), .out_valid(added_valid), .out_ready(1'b1));"""
  return '\n'.join([whole, collect, adder, after])


def _pooled(out: Stream, side: int, values: str) -> str:
  """Writes `pooled`: the maxima over side x side pixels."""
  sizes = f'.WIDTH({out.channels}), .BITS({out.bits}), .SERIAL({int(out.serial)}), .COLUMNS({out.columns})'
  return f"""  wire [{out.bus - 1}:0] pooled;
  wire pooled_valid;
  pool #({sizes}, .ROWS({out.rows}), .SIDE({side})) pool (
    .clk(clk), .rst(rst), .in_valid({values}_valid), .in_data({values}), .out_valid(pooled_valid), .out_data(pooled));"""
