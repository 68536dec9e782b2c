"""Builds the sdist and the wheel, installs the wheel into a clean environment, and uses it from an empty folder.

python scripts/check_wheel.py
python scripts/check_wheel.py --python=/usr/bin/python3.13 --out=docs/install.txt

The first environment has the core alone: a K-FAC step must run, nothing of the extras may be loaded, and the command
must name the extra that it misses. A strict type check of the step's program must be clean. Then the extra `train` is
added, and `kronmesh train --config=digits` must print its first line. The table has the seconds of each part, with the
packages downloaded or taken from pip's cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from kronmesh import files
from kronmesh.train.errors import RunError
from kronmesh.train.reporting.tables import columns

_PYTHON = flags.DEFINE_string('python', sys.executable, 'The interpreter of the clean environment.')
_OUT = flags.DEFINE_string('out', None, 'A .txt file for the table.')

# What a user writes to take a step; the two last lines are the check.
STEP = """\
import jax
import jax.numpy as jnp
import optax
from kronmesh import kron


def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.sum((kron.observe.gaussian(x @ w, y) - y) ** 2) / len(y) / 2


w, x, y = jnp.zeros((3, 2)), jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones((8, 2))
curvature = kron.curvature(loss, w, x, y, fisher='empirical')
tx = kron.kfac(0.1, curvature, damping=0.1)
value, grads, stats = curvature.value_and_grad(w, x, y)
updates, state = tx.update(grads, tx.init(w), w, stats=stats)
w = jnp.asarray(optax.apply_updates(w, updates))
print('loss', value, 'then', loss(w, x, y))
"""
LOADED = """
import sys
extras = ('flax', 'absl.app', 'ml_collections', 'orbax', 'grain', 'tensorflow_datasets', 'sklearn', 'einops')
print('extras loaded:', [name for name in extras if name in sys.modules])
"""


class Timer:
  """Runs commands in one folder and remembers the seconds of each."""

  def __init__(self, folder: Path):
    self.folder, self.rows = folder, []

  def __call__(self, name: str, *command: str | Path, code: int = 0) -> str:
    """Runs a command and returns its output.

    Raises:
      RunError: the exit code is not `code`.
    """
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'JAX_COMPILATION_CACHE_DIR')}
    begun = time.monotonic()
    done = subprocess.run(
      [str(word) for word in command], cwd=self.folder, env=env, text=True, capture_output=True, check=False
    )
    self.rows.append((name, f'{time.monotonic() - begun:.1f}'))
    text = done.stdout + done.stderr
    if done.returncode != code:
      raise RunError(f'{name} ended with code {done.returncode}: {" ".join(text.split())[-600:]}')
    return text

  def seconds(self, *names: str) -> float:
    return sum(float(seconds) for name, seconds in self.rows if name in names)


def build(timer: Timer, to: Path) -> Path:
  """Builds the sdist from the tracked files and the wheel from the sdist, and returns the wheel."""
  timer('build', sys.executable, '-m', 'build', '--outdir', to, ROOT)
  names = sorted(path.name for path in to.iterdir())
  if [Path(name).suffix for name in names] != ['.whl', '.gz']:
    raise RunError(f'the build made {names}, not one wheel and one sdist')
  return next(to.glob('*.whl'))


def check_core(timer: Timer, python: Path) -> None:
  """Takes a step with the core alone, and checks that the command names the extra that it misses."""
  (timer.folder / 'step.py').write_text(STEP + LOADED)
  said = timer('first step', python, 'step.py')
  before, after = (float(x) for x in re.search(r'loss ([\d.]+) then ([\d.]+)', said).groups())
  if not after < before or 'extras loaded: []' not in said:
    raise RunError(f'the step said {said!r}')
  said = timer('refused without train', python, '-m', 'kronmesh', 'configs', code=2)
  if "pip install 'kronmesh[train]'" not in said or len(said.splitlines()) != 1:
    raise RunError(f'without the extra, kronmesh said {said!r}')


def check_types(timer: Timer, python: Path) -> None:
  """Checks the types of the step's program strictly against the installed wheel."""
  (timer.folder / 'step.py').write_text(STEP)
  (timer.folder / 'pyrefly.toml').write_text('preset = "strict"\nproject-includes = ["step.py"]\n')
  timer('strict types', Path(sys.executable).parent / 'pyrefly', 'check', '--python-interpreter-path', python)


def check_train(timer: Timer, python: Path) -> None:
  """Trains a packaged config in a few steps by the installed command."""
  command = python.parent / 'kronmesh'
  if 'digits ' not in timer('kronmesh configs', command, 'configs'):
    raise RunError('kronmesh configs does not list digits')
  timer.rows.append(('first line of train', f'{first_line([command, "train", "--config=digits"], timer.folder):.1f}'))
  said = timer('ten steps of train', command, 'train', '--config=digits', '--config.steps=10', '--workdir=ten')
  if 'after 10 steps' not in said or not (timer.folder / 'ten/report.html').is_file():
    raise RunError(f'kronmesh train said {said[-600:]!r}')


def first_line(command: Sequence[str | Path], folder: Path) -> float:
  """Returns the seconds until a command prints its first line of progress; it is then ended."""
  begun = time.monotonic()
  process = subprocess.Popen(
    list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  line = process.stdout.readline()
  seconds = time.monotonic() - begun
  process.kill()
  process.communicate()
  if not line.strip() or line.startswith(('error', 'Traceback')):
    raise RunError(f'the first line was {line!r}')
  return seconds


def main() -> None:
  """Builds, installs, uses, and prints the seconds."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / 'empty'
    folder.mkdir()
    timer = Timer(folder)
    wheel = build(timer, Path(scratch) / 'dist')
    environment = Path(scratch) / 'environment'
    timer('environment', _PYTHON.value, '-m', 'venv', environment)
    python = environment / 'bin/python'
    pip = (python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '-c', ROOT / 'constraints.txt')
    timer('pip install wheel', *pip, wheel)
    check_core(timer, python)
    check_types(timer, python)
    timer('pip install wheel[train]', *pip, f'{wheel}[train]')
    check_train(timer, python)
    size = wheel.stat().st_size
    shutil.rmtree(environment)
  core = timer.seconds('pip install wheel', 'first step')
  train = core + timer.seconds('pip install wheel[train]', 'first line of train') - timer.seconds('first step')
  lines = [
    'python scripts/check_wheel.py',
    columns(['part', 'seconds'], timer.rows),
    f'the wheel has {size / 1e3:.0f} kB; from pip install to the first step {core:.0f} s; '
    f'with [train], to the first line of kronmesh train {train:.0f} s',
  ]
  text = '\n\n'.join(lines)
  print(text)
  if _OUT.value:
    files.write(Path(_OUT.value), text + '\n')


if __name__ == '__main__':
  launch.command(main, 'python scripts/check_wheel.py')
