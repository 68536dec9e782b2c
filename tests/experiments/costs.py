"""What the compiled programs of a K-FAC step cost by XLA's own count: python -m tests.experiments.costs stores it."""

from tests import conftest  # isort: skip  # noqa: F401  (eight devices, the tests' compiler flags)

import json
from pathlib import Path
from unittest import mock

import jax

from experiments.configs import noise
from kronmesh.train.build import build
from kronmesh.train.planning.programs import abstract, compile_all, programs_of

STORED = Path(__file__).parent / 'costs.json'
# Presets of experiments/configs/noise.py, at batches that compile to the same program and are quick to make.
CASES = {'small_resnet': 32, 'autoencoder': 64, 'small_vit': 16, 'small_gpt2': 8, 'small_resnet3d': 8}


def version() -> str:
  return '.'.join(jax.__version__.split('.')[:2])


def costs(preset: str) -> dict[str, dict[str, float]]:
  """Flops and bytes of each program, those of the inverses together."""
  config, one = noise.get_config(preset), jax.devices()[:1]
  config.mesh, config.data.batch_size = 'data=1', CASES[preset]
  with mock.patch('jax.devices', lambda *_: one):
    run = build(config)
    state, batch = abstract(run)
    found = compile_all(programs_of(run, state, batch), state, batch)
  result: dict[str, dict[str, float]] = {}
  for name, own in found.items():
    total = result.setdefault(name.split(' ')[0] if name.startswith('inverses') else name, {'flops': 0, 'bytes': 0})
    for k in total:
      total[k] += own[k]
  return result


if __name__ == '__main__':
  tables = json.loads(STORED.read_text()) if STORED.exists() else {}
  tables[version()] = {preset: costs(preset) for preset in CASES}
  STORED.write_text(json.dumps(tables, indent=1, sort_keys=True) + '\n')
