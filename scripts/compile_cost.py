"""Measures the tracing and compilation that statistics add, and how programs grow with depth.

python scripts/compile_cost.py --out=docs/compile_cost

The models are ResNet-50 as in experiments/configs/imagenet_resnet50.py (224 pixels, bf16) and thinner ones of growing
depth. Times are ratios to the plain gradient's. All programs are measured in turn in one process. The results are a
table and a JSON file.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from absl import app, flags

from kronmesh import kron, models
from kronmesh.train import jsonfile
from kronmesh.train.reporting.tables import columns
from scripts.losses import problem

_OUT = flags.DEFINE_string('out', None, 'Where to write OUT.txt and OUT.json; nothing is written without it.')
_REPEATS = flags.DEFINE_integer('repeats', 3, 'How often each program is compiled; the median counts.')
_SIZE = flags.DEFINE_integer('size', 224, 'Pixels of an image side for ResNet-50.')

PROGRAMS = ('gradient', 'empirical', 'two passes', 'sampled')


def program(name: str, loss: Callable, params: Any, args: tuple) -> Callable:
  if name == 'gradient':
    return jax.value_and_grad(loss, has_aux=True)
  if name == 'two passes':
    return functools.partial(two_passes, loss)
  curvature = kron.curvature(loss, params, *args, fisher=name, has_aux=True)
  return curvature.value_and_grad


def two_passes(loss: Callable, params: Any, *args: Any) -> Any:
  """Computes the gradient and one more backward pass, the least that a sampled Fisher can cost."""
  value, pull, aux = jax.vjp(lambda params: loss(params, *args), params, has_aux=True)
  return value, aux, pull(jnp.ones_like(value)), pull(value)  # different cotangents, so that XLA shares nothing


def measure(name: str, loss: Callable, params: Any, args: tuple) -> dict[str, float]:
  """Measures the seconds to trace and to compile, and the number of traced operations."""
  jax.clear_caches()
  start = time.perf_counter()
  traced = jax.jit(program(name, loss, params, args)).trace(params, *args)
  lowered = traced.lower()
  middle = time.perf_counter()
  lowered.compile()
  return {'trace': middle - start, 'compile': time.perf_counter() - middle, 'hlo': operations(lowered)}


def operations(lowered: Any) -> int:
  return lowered.as_text().count(' = ')


def main(argv: list[str]) -> None:
  del argv
  jax.config.update('jax_enable_compilation_cache', False)
  resnet50 = models.ResNet(blocks=(3, 4, 6, 3), classes=1000, dtype=jnp.bfloat16)
  loss, params, args = problem(resnet50, _SIZE.value)
  runs: dict[str, list[dict]] = {name: [] for name in PROGRAMS}
  for _ in range(_REPEATS.value):
    for name in PROGRAMS:
      runs[name].append(measure(name, loss, params, args))
      print(name, runs[name][-1], file=sys.stderr)
  ratio = lambda key, name: statistics.median(  # noqa: E731
    key(run) / key(plain) for run, plain in zip(runs[name], runs['gradient'], strict=True)
  )
  first = [
    [
      name,
      ratio(lambda r: r['trace'] + r['compile'], name),
      ratio(lambda r: r['trace'], name),
      ratio(lambda r: r['compile'], name),
      runs[name][0]['hlo'],
    ]
    for name in PROGRAMS
  ]
  depths = []
  for n in (1, 2, 4, 8):
    loss, params, args = problem(models.ResNet(blocks=(n, n), classes=10, width=8, bottleneck=False, stem='small'), 16)
    curvature = kron.curvature(loss, params, *args, has_aux=True)
    counts = [operations(jax.jit(program(name, loss, params, args)).lower(params, *args)) for name in PROGRAMS]
    tx = kron.kfac(0.1, curvature)
    grads, stats = jax.eval_shape(curvature.value_and_grad, params, *args)[1:]
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(lambda g, s, p, st, tx=tx: tx.update(g, s, p, stats=st)).lower(grads, state, params, stats)
    depths.append([4 * n + 2, len(curvature.blocks), *counts, operations(update)])
  text = '\n\n'.join([
    'ResNet-50, 224 pixels, bf16: times as multiples of the plain gradient\'s, and operations of the program',
    columns(['program', 'trace + compile', 'trace', 'compile', 'operations'], first),
    'Operations by depth (layers of two widths)',
    columns(['layers', 'blocks', *PROGRAMS, 'update'], depths),
  ])  # fmt: skip
  print(text)
  if _OUT.value:
    Path(_OUT.value + '.txt').write_text(text + '\n')
    Path(_OUT.value + '.json').write_text(jsonfile.dumps({'runs': runs, 'depths': depths}, indent=1) + '\n')


if __name__ == '__main__':
  app.run(main)
