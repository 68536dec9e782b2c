"""Chooses which weights of a trained ternary network become zero, and exports the result.

  kronmesh prune --run=runs/float --zeros=0.95 --workdir=runs/pruned
  kronmesh train --config=ternary_digits:chosen --config.start=runs/pruned --workdir=runs/tuned

With --by=curvature a weight becomes zero, or plus or minus the scale of its channel, where K-FAC's curvature of the loss
says that this costs least; with --by=magnitude the smallest weights of each layer become zero. The second command trains
the network on with these zeros."""

from __future__ import annotations

from absl import flags

from ..tasks import pruning
from ..train.errors import ConfigError
from ..train.reporting.tables import columns
from ..train.runtime import launch

_RUN = flags.DEFINE_string('run', '', 'The work folder of the run whose network is pruned.')
_ZEROS = flags.DEFINE_float('zeros', 0.9, 'The share of zeros between the first layer and the head.', 0.0, 1.0)
_BY = flags.DEFINE_enum('by', 'curvature', pruning.WAYS, 'How weights are chosen.')
_BATCHES = flags.DEFINE_integer('batches', 20, 'Batches of training for the curvature and the batch norms.', 1)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/pruned', 'The folder for the result.')


def main() -> None:
  """Prunes the network of --run and prints what was chosen."""
  if not _RUN.value:
    raise ConfigError('give --run: the work folder of a finished run of a ternary network')
  done = pruning.prune(_RUN.value, _WORKDIR.value, _ZEROS.value, _BY.value, _BATCHES.value)
  rows = [(name, f'{share:.1%}', f'{done.cost[name]:.3g}') for name, share in sorted(done.zeros.items())]
  print(columns(('layer', 'zeros', 'growth of the loss by the curvature'), rows))
  print(f'\naccuracy {done.before["accuracy"]:.4f} before, {done.after["accuracy"]:.4f} after')
  print(f'train it on: --config.start={_WORKDIR.value} --config.model.rule=chosen')


def command() -> None:
  """Prunes the network that the command line names."""
  launch.command(main, 'kronmesh prune --run=runs/float --zeros=0.9')
