"""Times the A factor of a 3x3 convolution against its floor: by distance, as K-FAC computes it, and from patches.

python scripts/conv_factors.py --out=docs/conv_factors

Sizes are those of ResNet-50's 3x3 layers of stride 1, at an eighth of 256 images. Use --dtype=bfloat16 on a GPU. The
floor is the longer of two times: half of the products of all patches (the factor is symmetric) at the machine's peak,
and reading the images and writing the factor once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax

from kronmesh.kron.operators.patches import gram_of_patches, patches
from kronmesh.train import jsonfile
from kronmesh.train.reporting.tables import columns
from kronmesh.train.runtime.machine import least, machine

_OUT = flags.DEFINE_string('out', None, 'Where to write OUT.txt and OUT.json; nothing is written without it.')
_BATCH = flags.DEFINE_integer('batch', 32, 'Images.', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the images; sums are float32.')

LAYERS = ((56, 64), (28, 128), (14, 256), (7, 512))  # pixels of a side, channels
SAME = [(1, 1), (1, 1)]


def by_distance(x: jax.Array) -> jax.Array:
  return gram_of_patches(x, (3, 3), SAME, jnp.float32)


def of_patches(x: jax.Array) -> jax.Array:
  rows = patches(jnp.pad(x, [(0, 0), *SAME, (0, 0)]), (3, 3), (1, 1), (1, 1)).reshape(-1, 9 * x.shape[-1])
  return lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


WAYS: dict[str, Callable] = {'by distance': by_distance, 'of patches': of_patches}


def main(argv: list[str]) -> None:
  del argv
  dtype = jnp.dtype(_DTYPE.value)
  here = machine(dtype.name)
  rows = []
  for side, channels in LAYERS:
    x = jax.random.normal(jax.random.key(0), (_BATCH.value, side, side, channels), dtype)
    n = 9 * channels
    flops, bytes_ = _BATCH.value * side**2 * n**2, x.size * dtype.itemsize + 4 * n**2
    floor = max(flops / here.products, bytes_ / here.bandwidth)
    seconds = [least(fn, x) for fn in WAYS.values()]
    rows.append([f'{side}x{side}x{channels}', *(t / floor for t in seconds), seconds[1] / seconds[0]])
  title = f'{here.name}, {dtype.name}, batch {_BATCH.value}: times over the floor ({here.peaks})'
  text = '\n\n'.join([title, columns(['layer', *WAYS, 'patches / distance'], rows)])
  print(text)
  if _OUT.value:
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(_OUT.value + '.txt').write_text(text + '\n')
    Path(_OUT.value + '.json').write_text(jsonfile.dumps({'device': here._asdict(), 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
  app.run(main)
