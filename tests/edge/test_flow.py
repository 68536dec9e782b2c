"""The whole flow for a tiny network: simulated by Icarus Verilog, synthesised by Yosys; and its mistakes in one line.

`.ci/run` runs this file by itself: Yosys from PyPI compiles itself at its first use, which takes a minute.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from kronmesh.edge import Conv, EdgeError, report, simulate, synthesise
from kronmesh.edge.verilog import design
from kronmesh.tasks import synthesis
from kronmesh.train.errors import RunError
from kronmesh.train.loop import train
from tests.edge import networks
from tests.edge.test_deployed import config_of

pytestmark = [
  pytest.mark.long,
  pytest.mark.skipif(not shutil.which('iverilog'), reason='iverilog is not installed'),
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tiny')
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *a: devices)
    config = config_of('share', mesh='data=1', steps=2, optimizer='sgd')
    train(config, folder, quiet=True)
    yield folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr('pathlib.Path.home', lambda: tmp_path)
  return tmp_path / '.cache' / 'kronmesh' / 'synthesis'


def test_a_tiny_network_goes_the_whole_way(run, tmp_path, cache):
  told = []
  settings = ('ecp5-12k', 'serial', 3, 'iverilog')
  first = synthesis.flow(run, tmp_path / 'out', *settings, place=False, tell=told.append)
  assert told == ['simulating 3 images by iverilog', 'synthesising'] and first.images == 3
  assert [row.name for row in first.rows] == ['layer_0', 'layer_1', 'layer_2', 'head']
  assert all(0 < row.cells.luts < 3000 and row.cells.registers > 0 for row in first.rows)
  assert (tmp_path / 'out' / 'network.kmt').stat().st_size < 1000
  assert 'module network' in (tmp_path / 'out' / 'verilog' / 'network.v').read_text()
  assert json.loads(json.dumps(synthesis.numbers(first)))['simulated images'] == 3
  # What was synthesised is not synthesised again.
  kept = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
  again = synthesis.flow(run, tmp_path / 'out', *settings, place=False)
  assert again.cells == first.cells
  assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == kept and len(kept) == 5


def test_mistakes_are_told_before_anything_is_written(run, tmp_path, cache, monkeypatch):
  def refused(words, part='ecp5-85k', style='serial', images=1, simulator='iverilog', place=False):
    with pytest.raises(EdgeError, match=words):
      synthesis.flow(run, tmp_path / 'out', part, style, images, simulator, place)
    assert not (tmp_path / 'out').exists()

  refused("the part 'arria' is unknown; choose from ecp5-12k", part='arria')
  monkeypatch.setitem(synthesise.PARTS, 'tiny', synthesise.Part('12k', 500, 2))
  refused(
    r'tiny has 500 LUT4s and 2 block RAMs, and the network needs .* alone has .*: take --part=ecp5-12k', part='tiny'
  )
  monkeypatch.setattr(simulate.shutil, 'which', lambda name: None)
  refused('iverilog is not installed; install Debian package iverilog')
  monkeypatch.setattr(synthesise.sys, 'executable', '/none/python')
  refused(r'yosys is not installed; pip install kronmesh\[edge\]')


def test_a_stream_that_differs_is_noticed(run, tmp_path, monkeypatch):
  monkeypatch.setattr(simulate, 'differences', lambda *a: [(2, 7)])
  with pytest.raises(RunError, match='stream 2 of the simulation differs from the reference in 7 values'):
    synthesis.flow(run, tmp_path / 'out', 'ecp5-85k', 'serial', 1, 'iverilog', False)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('style', ['serial', 'parallel'])
def test_layers_are_busy_as_long_as_they_are_said_to_be(style):
  """The slowest layer sets the pace of images that come one after another."""
  network = networks.random_network((Conv(3), Conv(3, pool=2), Conv(2, kernel=5)), shape=(8, 6, 1))
  made = design(network, style)
  cycles = [simulate.simulate(made, networks.levels(network, n)).cycles for n in (2, 6)]
  assert (cycles[1] - cycles[0]) / 4 == max(row.cycles for row in report.rows(network, made))


def test_what_yosys_refuses_is_told(cache):
  made = design(networks.random_network((Conv(2),), shape=(3, 3, 1)))
  broken = made._replace(files={**made.files, 'layer_0.v': 'module layer_0; wire; endmodule'})
  with pytest.raises(EdgeError, match=r'layer_0: Yosys ends with .*syntax error'):
    synthesise.synthesise(broken, cache)


def test_parts_hold_what_their_data_sheet_says():
  sizes = [(p.luts, p.rams) for p in synthesise.PARTS.values()]
  assert sizes == sorted(sizes) and np.diff([s[0] for s in sizes]).min() > 0
