"""Simulation of a network's Verilog by Icarus Verilog or Verilator, with every stream compared to the reference.

The bench sends images pixel by pixel, keeps back the input and the output at random, and writes down each beat that
passes on every stream.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from . import reference
from .errors import EdgeError
from .layers import Network
from .verilog.layer import Stream
from .verilog.top import Design

TOOLS = {'iverilog': 'Debian package iverilog', 'verilator': 'Debian package verilator'}


class Simulated(NamedTuple):
  """What a simulation gave. streams: all streams, as `reference.streams` returns them. cycles: until the last result.

  first: cycles until the first result.
  """

  streams: list[Int[np.ndarray, 'b *place channels']]
  cycles: int
  first: int


def simulate(
  design: Design,
  levels: UInt8[np.ndarray, 'b height width channels'],
  tool: str = 'iverilog',
  stalls: int = 0,
  folder: str | Path | None = None,
) -> Simulated:
  """Runs images through a design.

  Args:
    tool: 'iverilog' (starts at once, for small networks) or 'verilator' (compiles first, for many images).
    stalls: of 16 cycles, in how many at random the input, and likewise the output, is kept back.
    folder: where the bench and its files are kept; a temporary one otherwise.

  Raises:
    EdgeError: the tool is missing, does not accept the design, or the network does not give all results in time.
  """
  need(tool)
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(folder or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in design.files.items():
      (folder / name).write_text(text)
    (folder / 'bench.v').write_text(bench(design, len(levels)))
    first = design.streams[0]
    pixels = _words(np.asarray(levels, np.int64).reshape(-1, first.channels), first.bits)
    (folder / 'images.hex').write_text('\n'.join(f'{p:x}' for p in pixels) + '\n')
    command = _built(tool, folder)
    done = subprocess.run([*command, f'+stalls={stalls}'], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or 'finished' not in done.stdout:
      raise EdgeError(f'{tool}: {(done.stdout + done.stderr).strip().splitlines()[-1:] or "it ended without a word"}')
    said = dict(line.split() for line in done.stdout.splitlines() if line.startswith(('cycles ', 'first ')))
    streams = [_read(folder / f's{i}.txt', s, len(levels)) for i, s in enumerate(design.streams)]
  half = 1 << (design.streams[-1].bits - 1)
  streams[-1] = (streams[-1] ^ half) - half  # the head's sums are two's complement
  return Simulated(streams, int(said['cycles']), int(said['first']))


def need(tool: str) -> str:
  """Returns the path of a tool.

  Raises:
    EdgeError: it is not installed, or unknown.
  """
  if tool not in TOOLS:
    raise EdgeError(f'the simulator {tool!r} is unknown; choose from {", ".join(TOOLS)}')
  path = shutil.which(tool)
  if path is None:
    raise EdgeError(f'{tool} is not installed; install {TOOLS[tool]}')
  return path


def differences(network: Network, simulated: Simulated, levels: np.ndarray) -> list[tuple[int, int]]:
  """Returns, for each stream that differs from the reference, its number and how many of its values differ."""
  expected = reference.streams(network, levels)
  found = []
  for i, (mine, theirs) in enumerate(zip(expected, simulated.streams, strict=True)):
    wrong = (
      mine.size
      if mine.reshape(theirs.shape).shape != theirs.shape
      else int((mine.reshape(theirs.shape) != theirs).sum())
    )
    if wrong:
      found.append((i, wrong))
  return found


def _built(tool: str, folder: Path) -> list[str]:
  sources = sorted(p.name for p in folder.glob('*.v'))
  if tool == 'iverilog':
    command = ['iverilog', '-g2012', '-o', 'bench.vvp', '-s', 'bench', *sources]
    run = ['vvp', '-n', 'bench.vvp']
  else:
    command = ['verilator', '--binary', '--timing', '-O3', '-CFLAGS', '-O1', '-Wno-fatal', '-Wno-lint', '-j', '2']
    command += ['--top-module', 'bench', '-Mdir', 'made', *sources]
    run = [str(folder / 'made' / 'Vbench')]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
  if done.returncode:
    said = (done.stderr or done.stdout).strip().splitlines()
    raise EdgeError(f'{tool} does not accept the design: {said[0] if said else "it does not say why"}')
  return run


def _words(values: np.ndarray, bits: int) -> list[int]:
  """Returns a whole number for each row, its first value lowest."""
  return [sum(int(v) << (bits * i) for i, v in enumerate(row)) for row in values]


def _read(path: Path, stream: Stream, images: int) -> np.ndarray:
  """Reads the beats of a stream back into images."""
  beats = [int(line, 16) for line in path.read_text().split()]
  shape = (images, stream.rows, stream.columns, stream.channels)
  pixels = images * stream.rows * stream.columns
  beats = beats[: pixels * stream.beats]
  if len(beats) < pixels * stream.beats:
    raise EdgeError(f'{path.name} has {len(beats)} beats, not {pixels * stream.beats}')
  if stream.serial:
    rows = np.array([[b >> c & 1 for c in range(stream.channels)] for b in beats], np.int64)
    planes = rows.reshape(pixels, stream.bits, stream.channels)
    return np.einsum('pbc,b->pc', planes, 1 << np.arange(stream.bits - 1, -1, -1)).reshape(shape)
  mask = (1 << stream.bits) - 1
  return np.array([[b >> (stream.bits * c) & mask for c in range(stream.channels)] for b in beats], np.int64).reshape(
    shape
  )


def bench(design: Design, images: int) -> str:
  """Writes the bench for a number of images."""
  first, last = design.streams[0], design.streams[-1]
  pixels, results = images * first.rows * first.columns, images * last.rows * last.columns
  most = 400 * pixels * max(s.bits for s in design.streams[:-1]) + 100_000
  watches = '\n'.join(
    f'    if (dut.s{i}_valid & dut.s{i}_ready) $fdisplay(file_{i}, "%h", dut.s{i}_data);'
    for i in range(len(design.streams))
  )
  opened = '\n'.join(f'    file_{i} = $fopen("s{i}.txt", "w");' for i in range(len(design.streams)))
  files = ', '.join(f'file_{i}' for i in range(len(design.streams)))
  return f"""`timescale 1ns / 1ps
module bench;
  reg clk = 1'b0, rst = 1'b1;
  reg [{first.bus - 1}:0] images [0:{pixels - 1}];
  reg [{first.bus - 1}:0] in_data = 0;
  reg in_valid = 1'b0, out_ready = 1'b0;
  wire in_ready, out_valid;
  wire [{last.bus - 1}:0] out_data;
  integer sent = 0, received = 0, cycle = 0, stalls = 0, seed = 1, {files};
  network dut (
    .clk(clk), .rst(rst), .in_data(in_data), .in_valid(in_valid), .in_ready(in_ready),
    .out_data(out_data), .out_valid(out_valid), .out_ready(out_ready));
  always #5 clk = ~clk;
  initial begin
    $readmemh("images.hex", images);
{opened}
    if (!$value$plusargs("stalls=%d", stalls)) stalls = 0;
  end
  // Inputs change between the edges at which the network reads them.
  always @(negedge clk) begin
    rst <= cycle < 4;
    if (~rst) begin
      if (~in_valid | in_taken) begin
        in_valid <= sent < {pixels} && $unsigned($random(seed)) % 16 >= stalls;
        in_data <= images[sent < {pixels} ? sent : {pixels - 1}];
      end
      out_ready <= $unsigned($random(seed)) % 16 >= stalls;
    end
  end
  reg in_taken = 1'b0;
  always @(posedge clk) begin
    cycle <= cycle + 1;
    in_taken <= ~rst & in_valid & in_ready;
    if (~rst) begin
{watches}
    if (in_valid & in_ready) sent <= sent + 1;
    if (out_valid & out_ready) begin
      received <= received + 1;
      if (received == 0) $display("first %0d", cycle);
      if (received == {results - 1}) begin
        $display("cycles %0d", cycle);
        $display("finished");
        $finish;
      end
    end
    end
    if (cycle == {most}) begin
      $display("after %0d cycles, %0d of {pixels} pixels were taken and %0d of {results} results came",
        cycle, sent, received);
      $finish;
    end
  end
endmodule
"""
