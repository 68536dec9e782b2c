"""Packs a trained ternary network into a file of a few bits for each weight, and checks it.

  kronmesh pack --run=runs/ternary --out=digits.kmt

The file is read back, and its network computes the evaluation's examples in integers. The run's own evaluation, the
reference and the compiled program must give the same logits; the command says how many examples were compared."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from ..tasks import deployed
from ..train.errors import ConfigError
from ..train.reporting.tables import columns
from ..train.runtime import launch

_RUN = flags.DEFINE_string('run', '', 'The work folder of a finished run of a ternary network.')
_OUT = flags.DEFINE_string('out', 'network.kmt', 'The file.')
_EXAMPLES = flags.DEFINE_integer('examples', 10_000, 'At most how many examples of the evaluation are compared.', 1)


def main() -> None:
  """Packs the network of --run and prints its sizes."""
  if not _RUN.value:
    raise ConfigError('give --run: the work folder of a finished run of a ternary network')
  done = deployed.pack_run(_RUN.value, Path(_OUT.value), _EXAMPLES.value)
  rows = [(s.name, f'{s.weights:,}', f'{s.nonzero:,}', f'{1 - s.nonzero / s.weights:.1%}') for s in done.layers]
  print(columns(('layer', 'weights', 'not zero', 'zeros'), rows))
  print(f'\n{_OUT.value}: {done.bytes:,} bytes, {done.float_bytes / done.bytes:.1f} times smaller than in float32')
  print(f'accuracy {done.accuracy:.4f} on {done.examples:,} examples, all logits equal in every form')


def command() -> None:
  """Packs the network that the command line names."""
  launch.command(main, 'kronmesh pack --run=runs/ternary --out=network.kmt')
