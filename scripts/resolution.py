"""Plans one video model from 112 pixels to 8K on several numbers of devices, and measures the steps that fit.

  python scripts/resolution.py --out=docs/resolution
  python scripts/resolution.py --model=small --shards=1,2,4 --out=runs/resolution

Every size is compiled for every number of strips (`kronmesh plan`, in a separate process). If a step fits on the
devices of this machine, it is run and timed. If not, the table says what is lacking. --model=small is the narrow model
of experiments/configs/resolution.py.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
import matplotlib
from absl import flags

from experiments.configs import resolution
from kronmesh.commands.palette import OTHERS
from kronmesh.train import jsonfile
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.reporting.tables import columns
from kronmesh.train.runtime.machine import machine

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter, NullLocator

ROOT = Path(__file__).resolve().parents[1]
EMULATED = 8  # the most CPU devices on which steps are run
_MODEL = flags.DEFINE_enum('model', 'full', ['full', 'small'], 'Which of the two models.')
_SIZES = flags.DEFINE_list('sizes', list(resolution.SIZES), 'Of the frames.')
_SHARDS = flags.DEFINE_list('shards', ['1', '4', '16', '64'], 'Numbers of strips that are planned.')
_SECONDS = flags.DEFINE_float(
  'seconds', 120.0, 'The longest step that is run; longer ones are left out, and said to be.'
)
_OUT = flags.DEFINE_string('out', None, 'Where to write OUT/MODEL.json, .txt and .png; nothing is written without it.')
_STEP = flags.DEFINE_string(
  'step', '', 'Run steps of this preset and mesh and print one JSON line; for the script itself.'
)


Found = dict[str, dict[int, dict[str, Any]]]  # by size and number of strips


def planned(preset: str, shards: int) -> dict[str, Any]:
  """Returns the forecast of `kronmesh plan`, or the reason why there is none."""
  command = [sys.executable, str(ROOT / 'experiments/plan.py'), f'--config=resolution:{preset}']
  done = subprocess.run([*command, f'--mesh=space={shards}', '--json'], capture_output=True, text=True, cwd=ROOT)
  if done.returncode:
    return {'why': done.stderr.strip().splitlines()[-1].removeprefix('error: ')}
  return json.loads(done.stdout[done.stdout.index('{') :])


def room() -> tuple[int, str]:
  """Returns the bytes that a run may take on this machine, and a name for that memory."""
  stats = jax.devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'], jax.devices()[0].device_kind
  line = next(line for line in Path('/proc/meminfo').read_text().splitlines() if line.startswith('MemAvailable'))
  return int(line.split()[1]) * 1024, "this machine's memory"


def timed(preset: str, shards: int) -> dict[str, Any]:
  """Measures the seconds of a step in a separate process."""
  command = [sys.executable, __file__, f'--step={preset},{shards}']
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  if done.returncode:
    return {'why': (done.stderr.strip().splitlines() or ['it was ended'])[-1].removeprefix('error: ')}
  return json.loads(done.stdout.splitlines()[-1])


def steps(preset: str, shards: int) -> dict[str, Any]:
  """Measures the median of three K-FAC steps after two that compile, with statistics and inverses when due."""
  jax.config.update('jax_num_cpu_devices', shards)
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  config = resolution.get_config(preset)
  config.mesh = f'space={shards}'
  run = build(config)
  state, batch = run.init(0), next(run.train_batches(0, 0))
  times = []
  for number in range(5):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(run.step(state, batch, 1000 * 96 + number + 1))
    times.append(time.perf_counter() - start)
  return {'seconds': statistics.median(times[2:]), 'loss': float(metrics['loss'])}


def measure(size: str, shards: int, layout: dict[str, Any], rate: float | None) -> dict[str, Any]:
  """Times a step on `shards` strips if there are enough devices (emulated on a CPU), it fits and it ends in time."""
  emulated = jax.default_backend() == 'cpu'
  if 'why' in layout:
    return layout
  if shards > (EMULATED if emulated else len(jax.devices())):
    return {'why': f'{shards} devices are wanted'}
  limit, of = room()
  need = layout['memory'] * (shards if emulated else 1)
  if need > limit:
    return {'why': f'{need / 2**30:.1f} GiB of {limit / 2**30:.1f} ({of})'}
  work = layout['programs']['gradient']['flops'] * shards
  if rate and work / rate > _SECONDS.value:
    return {'why': f'a step would take {work / rate:.0f} s'}
  result = timed(name_of(size), shards)
  return {**result, 'rate': work / result['seconds']} if 'seconds' in result else result


def name_of(size: str) -> str:
  return f'small_{size}' if _MODEL.value == 'small' else size


def temporaries(programs: dict[str, Any]) -> int:
  return max(p['temporaries'] for name, p in programs['programs'].items() if name.startswith('gradient'))


def moved(programs: dict[str, Any]) -> int:
  """Returns the bytes of halos that a device passes on in a step."""
  return sum(size for what, (_, size) in programs['programs']['gradient']['collectives'].items() if 'permute' in what)


def rows_of(plans: Found, runs: Found) -> list[list[Any]]:
  rows = []
  for size, by_shards in plans.items():
    first = next((n for n in by_shards if n >= 4 and 'why' not in by_shards[n]), None)
    for shards, measured in by_shards.items():
      if 'why' in measured:
        rows.append([size, shards, *['-'] * 7, measured['why'][:90]])
        continue
      fall = ''
      if first and shards > first:
        fall = f'{temporaries(by_shards[first]) / temporaries(measured) / (shards / first):.2f}'
      step, run = measured['programs']['gradient'], runs[size][shards]
      gathers = [g for g in step['gathers'] if 'space' in g['axes']]
      rows.append([
        size, shards, f'{measured["memory"] / 2**30:.2f}', f'{temporaries(measured) / 2**30:.2f}', fall,
        f'{step["flops"] / frames_of(size) / 1e9:.4g}', f'{moved(measured) / 2**20:.1f}', len(gathers),
        f'{run["seconds"] / frames_of(size):.3g}' if 'seconds' in run else '-', run.get('why', ''),
      ])  # fmt: skip
  return rows


def frames_of(size: str) -> int:
  return resolution.get_config(name_of(size)).data.shape[0]


def plot(plans: Found, runs: Found, path: Path) -> None:
  """Plots memory and work per device, and the measured time of a frame, against the number of strips."""
  figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
  colour_of = dict(zip(plans, OTHERS, strict=False))
  for size, by_shards in plans.items():
    style = {'marker': 'o', 'color': colour_of[size], 'label': size}
    there = {n: measured for n, measured in by_shards.items() if 'why' not in measured}
    left.loglog(list(there), [measured['memory'] / 2**30 for measured in there.values()], **style)
    work = [measured['programs']['gradient']['flops'] / frames_of(size) / 1e12 for measured in there.values()]
    middle.loglog(list(there), work, **style)
    times = {n: r['seconds'] / frames_of(size) for n, r in runs[size].items() if 'seconds' in r}
    if times:
      right.loglog(list(times), list(times.values()), **style)
  left.axhline(80, color='grey', linewidth=0.8)
  left.annotate('80 GiB', (1, 80), (0, 3), textcoords='offset points', color='grey', fontsize=8)
  left.set(xlabel='strips', ylabel='GiB a device', title='memory of a training step, planned')
  middle.set(xlabel='strips', ylabel='Tflop a frame and device', title='work, planned')
  right.set(xlabel='strips', ylabel='seconds a frame', title=f'measured: {jax.devices()[0].device_kind}')
  counts = sorted({n for by_shards in plans.values() for n in by_shards})
  for axes in (left, middle, right):
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend(frameon=False)
  figure.savefig(path, dpi=110)


def main(config: Any, workdir: str) -> None:
  del config, workdir
  if _STEP.value:
    preset, _, shards = _STEP.value.partition(',')
    print(jsonfile.dumps(steps(preset, int(shards))))
    return
  unknown = [s for s in _SIZES.value if s not in resolution.SIZES]
  if unknown:
    raise ConfigError(f'--sizes: {unknown[0]!r} is unknown; choose from {", ".join(resolution.SIZES)}')
  if not all(s.isascii() and s.isdigit() and 0 < int(s) <= 512 for s in _SHARDS.value):
    raise ConfigError(f'--shards={",".join(_SHARDS.value)}: numbers from 1 to 512')
  plans: Found = {}
  runs: Found = {}
  rate = None
  for size in _SIZES.value:
    plans[size], runs[size] = {}, {}
    for shards in map(int, _SHARDS.value):
      planned_here = plans[size][shards] = planned(name_of(size), shards)
      run = runs[size][shards] = measure(size, shards, planned_here, rate)
      rate = run.get('rate', rate)
      print(
        f'{size} in {shards} strips: {run.get("why") or format(run["seconds"], ".3g") + " s a step"}', file=sys.stderr
      )
  header = ['size', 'strips', 'GiB', 'temporary', 'fall', 'Gflop', 'halo, MiB', 'gathers', 'seconds', 'not run']
  device = machine('float32')
  text = '\n\n'.join([
    f'planned on each device (flops of a frame; fall of temporaries from the first of 4 strips and more, 1 being in\n'
    f'proportion), and seconds a frame on {device.name}, strips on as many devices, emulated if it is a CPU',
    columns(header, rows_of(plans, runs)),
  ])  # fmt: skip
  print(text)
  if _OUT.value:
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{_MODEL.value}.txt').write_text(text + '\n')
    slim = {size: {n: _slim(measured) for n, measured in by_shards.items()} for size, by_shards in plans.items()}
    (out / f'{_MODEL.value}.json').write_text(
      jsonfile.dumps({'device': device._asdict(), 'plans': slim, 'runs': runs}, indent=1) + '\n'
    )
    plot(plans, runs, out / f'{_MODEL.value}.png')


def _slim(measured: dict[str, Any]) -> dict[str, Any]:
  """Returns a plan without the inverses' programs, of which there is one for each matrix size."""
  if 'why' in measured:
    return measured
  programs = {name: p for name, p in measured['programs'].items() if not name.startswith('inverses')}
  return {**measured, 'programs': programs}


if __name__ == '__main__':
  launch(main)
