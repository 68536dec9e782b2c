"""Reads sixty files and folders that a hostile stranger might hand out, each in a separate process.

python scripts/hostile.py
python scripts/hostile.py --only=films

Each must be refused in one line or read correctly, within 20 seconds and 4 GB of memory, and must write nothing outside
its folder. The script prints the kinds and the outcomes. The exit code is 3 if any input fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.reporting.tables import columns
from scripts.hostile_inputs import KINDS, hold, made, tried

_ONLY = flags.DEFINE_list('only', [], 'Kinds; default: all.')
_TRY = flags.DEFINE_string('try', '', 'KIND:NUMBER:FOLDER, of the process that reads one.')
_SECONDS, _BYTES = 20.0, 4e9


class Outcome(NamedTuple):
  """The outcome of one input. kind: 'read', 'refused', or what went wrong. words: the output."""

  kind: str
  words: str
  seconds: float
  bytes: float

  @property
  def good(self) -> bool:
    return self.kind in ('read', 'refused') and self.seconds <= _SECONDS and self.bytes <= _BYTES


def attempt(kind: str, number: int) -> Outcome:
  """Makes one input, has another process read it, and returns the outcome."""
  with tempfile.TemporaryDirectory() as outside:
    folder = Path(outside) / 'inside'
    folder.mkdir()
    made(kind, number, folder)
    before = hold(Path(outside))
    command = [sys.executable, __file__, f'--try={kind}:{number}:{folder}']
    start, most = time.monotonic(), 0.0
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status, began = Path(f'/proc/{child.pid}/status'), None
    while child.poll() is None:
      try:
        lines = status.read_text().splitlines()
      except OSError:
        break
      resident = next((int(line.split()[1]) * 1024 for line in lines if line.startswith('VmRSS')), 0)
      most = max(most, resident)
      # Python, JAX and TFDS take seconds to import on a loaded machine, so the clock starts after the imports.
      began = began or (time.monotonic() if (folder / '.begun').exists() else None)
      if (began and time.monotonic() - began > _SECONDS) or most > _BYTES or time.monotonic() - start > 15 * _SECONDS:
        child.kill()
      time.sleep(0.02)
    out, err = child.communicate()
    seconds = time.monotonic() - (began or start)
    if hold(Path(outside)) != before:
      return Outcome('wrote outside', err[-300:], seconds, most)
    told = [line for line in err.splitlines() if line.startswith('error: ')]
    if child.returncode == 0:
      return Outcome('read', out.strip().splitlines()[-1] if out.strip() else '', seconds, most)
    if child.returncode in (2, 3) and len(told) == 1 and 'Traceback' not in err:
      return Outcome('refused', told[0].removeprefix('error: '), seconds, most)
    return Outcome(f'code {child.returncode}', err[-300:], seconds, most)


def main() -> None:
  if _TRY.value:
    kind, number, folder = _TRY.value.split(':', 2)
    (Path(folder) / '.begun').touch()
    print(tried(kind, int(number), Path(folder)))
    return
  unknown = [kind for kind in _ONLY.value if kind not in KINDS]
  if unknown:
    raise ConfigError(f'--only={unknown[0]} is unknown; choose from {", ".join(KINDS)}')
  rows, wrong = [], 0
  for kind in _ONLY.value or KINDS:
    for number, name in enumerate(KINDS[kind]):
      outcome = attempt(kind, number)
      wrong += not outcome.good
      rows.append(
        [kind, name, outcome.kind, f'{outcome.seconds:.1f}', f'{outcome.bytes / 1e9:.2f}', outcome.words[:110]]
      )
      print(f'{kind}: {name}: {outcome.kind}', flush=True)
  print(columns(['kind', 'input', 'outcome', 'seconds', 'GB', 'what was said'], rows))
  if wrong:
    raise RunError(f'{wrong} of {len(rows)} inputs were neither read nor refused in one line')
  print(f'{len(rows)} inputs of {len({row[0] for row in rows})} kinds: read, or refused in one line')


if __name__ == '__main__':
  launch.command(main, '--only=films')
