"""Lists the layers of a config's model that K-FAC covers, with the sizes of their factors, and those that it does not.

  kronmesh coverage --config=digits
  kronmesh coverage --config=imagenet_resnet50 --config.data.name=noise --config.data.shape='(224,224,3)'

Nothing is trained or written. An unsupported use of a parameter is an error that names the parameter and the line.
"""

from __future__ import annotations

from typing import Any

from ..train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

from ..train.build import build
from ..train.errors import ConfigError
from ..train.optimizers import SECOND_ORDER
from ..train.runtime import processes


def main(config: Any, workdir: str) -> None:
  """Prints what K-FAC covers of a config's model."""
  del workdir
  if config.optimizer not in SECOND_ORDER:
    raise ConfigError(f'config.optimizer={config.optimizer!r} has no curvature; choose from {", ".join(SECOND_ORDER)}')
  run = build(config)
  if processes.chief():
    print(run.coverage)


def command() -> None:
  """Prints the coverage of the config that the command line names."""
  launch(main)
