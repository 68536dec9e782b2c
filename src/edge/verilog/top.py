"""A network as Verilog: its layers in a row, each with a queue behind it, and the streams that are added later."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from .. import layers
from ..errors import EdgeError
from ..layers import Network
from .layer import PARALLEL, SERIAL, Module, Stream, conv_layer, head_layer

STYLES = (SERIAL, PARALLEL)


class Design(NamedTuple):
  """A written network. files: its texts by name, the library's among them. top: the module of the whole.

  streams: of the input, each layer, and the head, as their queues give them. styles: of each layer and the head.
  """

  files: dict[str, str]
  top: str
  streams: tuple[Stream, ...]
  styles: tuple[str, ...]


def library() -> dict[str, str]:
  """Returns the texts of the library's modules by file name."""
  folder = resources.files(__package__) / 'library'
  return {
    file.name: file.read_text() for file in sorted(folder.iterdir(), key=lambda f: f.name) if file.name[-2:] == '.v'
  }


def design(network: Network, styles: str | Sequence[str] = SERIAL) -> Design:
  """Writes a network's Verilog.

  Args:
    styles: for each layer and the head, or for all, 'serial' (bit by bit: the least logic) or 'parallel' (a pixel each
      cycle).

  Raises:
    EdgeError: a style is unknown, or the network's sums could overflow.
  """
  layers.check(network)
  count = len(network.layers) + 1
  styles = (styles,) * count if isinstance(styles, str) else tuple(styles)
  if len(styles) != count:
    raise EdgeError(f'{len(styles)} styles for {count - 1} layers and a head')
  for i, style in enumerate(styles):
    if style not in STYLES:
      raise EdgeError(f'layer {i}: the style {style!r} is unknown; choose from {", ".join(STYLES)}')
  height, width, channels = network.shape
  streams = [Stream(height, width, channels, network.plan.bits, False)]
  modules: list[Module] = []
  for i, style in enumerate(styles):
    read = streams[-1]._replace(serial=style == SERIAL)
    if i < len(network.layers):
      modules.append(conv_layer(f'layer_{i}', network.plan.convs[i], network.layers[i], read))
    else:
      modules.append(head_layer('head', network.head, read, network.plan.by_place))
    streams.append(modules[-1].out)
  files = library() | {file: text for m in modules for file, text in m.files.items()}
  files['network.v'] = _top(network, modules, streams)
  return Design(files, 'network', tuple(streams), styles)


def _top(network: Network, modules: Sequence[Module], streams: Sequence[Stream]) -> str:
  first, last = streams[0], streams[-1]
  lines = [
    f'// {len(modules) - 1} layers and a head. A pixel comes in one beat of {first.channels} x {first.bits} bits, the',
    "// first channel lowest. A result leaves in one beat, its first output lowest, in two's complement. A beat passes",
    '// where both valid and ready are set.',
    'module network (',
    '  input wire clk,',
    '  input wire rst,',
    f'  input wire [{first.bus - 1}:0] in_data,',
    '  input wire in_valid,',
    '  output wire in_ready,',
    f'  output wire [{last.bus - 1}:0] out_data,',
    '  output wire out_valid,',
    '  input wire out_ready',
    ');',
    *(
      f'  wire [{s.bus - 1}:0] s{i}_data;  // stream {i}: {s.channels} channels of {s.rows} x {s.columns}\n'
      f'  wire s{i}_valid, s{i}_ready;'
      for i, s in enumerate(streams)
    ),
    '  assign s0_data = in_data;',
    '  assign s0_valid = in_valid;',
    '  assign in_ready = s0_ready;',
  ]
  adds = {conv.add: i for i, conv in enumerate(network.plan.convs) if conv.add is not None}
  if len(adds) < sum(conv.add is not None for conv in network.plan.convs):
    raise EdgeError('two layers add the same stream; let one of them add another')
  for i, module in enumerate(modules):
    lines += _reader(network, i, module, streams, adds)
  lines += [
    f'  assign out_data = s{len(modules)}_data;',
    f'  assign out_valid = s{len(modules)}_valid;',
    f'  assign s{len(modules)}_ready = out_ready;',
    'endmodule',
    '',
  ]
  return '\n'.join(lines)


def _reader(network: Network, i: int, module: Module, streams: Sequence[Stream], adds: dict[int, int]) -> list[str]:
  """Writes how layer i reads stream i, and its queue, which gives stream i + 1."""
  stream, out = streams[i], streams[i + 1]
  serial = module.read.serial
  data, valid, ready = f's{i}_data', f's{i}_valid', f's{i}_ready'
  lines = ['', f'  // {module.name}']
  if i in adds:
    lines += _kept(network, i, adds[i], stream, streams)
    valid, ready = f's{i}_on_valid', f's{i}_on_ready'
  if serial != stream.serial:
    kind = 'planes' if serial else 'words'
    lines += [
      f'  wire [{module.read.bus - 1}:0] s{i}_as_data;',
      f'  wire s{i}_as_valid, s{i}_as_ready;',
      f'  {kind} #(.WIDTH({stream.channels}), .BITS({stream.bits})) s{i}_as (',
      f'    .clk(clk), .rst(rst), .in_data({data}), .in_valid({valid}), .in_ready({ready}),',
      f'    .out_data(s{i}_as_data), .out_valid(s{i}_as_valid), .out_ready(s{i}_as_ready));',
    ]
    data, valid, ready = f's{i}_as_data', f's{i}_as_valid', f's{i}_as_ready'
  adding = i < len(network.layers) and network.plan.convs[i].add is not None
  earlier = ''
  if adding:
    j = network.plan.convs[i].add
    earlier = f'    .earlier(kept_{j}_data), .take_earlier(kept_{j}_ready),'
  depth = max(32, 1 << (2 * module.spare - 1).bit_length())
  lines += [
    f'  wire [{out.bus - 1}:0] {module.name}_data;',
    f'  wire {module.name}_valid, {module.name}_room;',
    f'  {module.name} {module.name} (',
    f'    .clk(clk), .rst(rst), .in_data({data}), .in_valid({valid}), .in_ready({ready}),',
    f'    .room({module.name}_room),',
    *([earlier] if earlier else []),
    f'    .out_data({module.name}_data), .out_valid({module.name}_valid));',
    f'  fifo #(.WIDTH({out.bus}), .DEPTH({depth}), .SPARE({module.spare})) queue_{i + 1} (',
    f'    .clk(clk), .rst(rst), .in_data({module.name}_data), .in_valid({module.name}_valid), .room({module.name}_room),',
    f'    .out_data(s{i + 1}_data), .out_valid(s{i + 1}_valid), .out_ready(s{i + 1}_ready));',
  ]
  return lines


def _kept(network: Network, i: int, user: int, stream: Stream, streams: Sequence[Stream]) -> list[str]:
  """Writes how stream i is kept for layer `user`, which adds it: as whole pixels, as many as the layers until then hold."""
  pixels = 8
  for j in range(i, user + 1):
    around, columns = network.plan.convs[j].kernel // 2, streams[j].columns
    pixels += around * (columns + around) + around + 8
  depth = 1 << (pixels - 1).bit_length()
  wide = stream.channels * stream.bits
  data, valid, ready = f's{i}_data', f's{i}_off_valid', f's{i}_off_ready'
  lines = [
    f'  wire s{i}_on_valid, s{i}_on_ready, s{i}_off_valid, s{i}_off_ready;',
    f'  fork2 fork_{i} (',
    f'    .clk(clk), .rst(rst), .in_valid(s{i}_valid), .in_ready(s{i}_ready),',
    f'    .a_valid(s{i}_on_valid), .a_ready(s{i}_on_ready), .b_valid(s{i}_off_valid), .b_ready(s{i}_off_ready));',
  ]
  if stream.serial:
    lines += [
      f'  wire [{wide - 1}:0] s{i}_whole_data;',
      f'  wire s{i}_whole_valid, s{i}_whole_ready;',
      f'  words #(.WIDTH({stream.channels}), .BITS({stream.bits})) s{i}_whole (',
      f'    .clk(clk), .rst(rst), .in_data({data}), .in_valid({valid}), .in_ready({ready}),',
      f'    .out_data(s{i}_whole_data), .out_valid(s{i}_whole_valid), .out_ready(s{i}_whole_ready));',
    ]
    data, valid, ready = f's{i}_whole_data', f's{i}_whole_valid', f's{i}_whole_ready'
  return [
    *lines,
    f'  wire [{wide - 1}:0] kept_{i}_data;',
    f'  wire unused_kept_{i}_valid, kept_{i}_ready, kept_{i}_room;',
    f'  assign {ready} = kept_{i}_room;',
    f'  fifo #(.WIDTH({wide}), .DEPTH({depth}), .SPARE(4)) kept_{i} (',
    f'    .clk(clk), .rst(rst), .in_data({data}), .in_valid({valid} & kept_{i}_room), .room(kept_{i}_room),',
    f'    .out_data(kept_{i}_data), .out_valid(unused_kept_{i}_valid), .out_ready(kept_{i}_ready));',
  ]
