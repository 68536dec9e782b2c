"""Searches a folder of videos for shots like an example, and writes a page of thumbnails and a TREC run file.

python scripts/find.py --videos=/my/films --example=/my/clip.mp4
python scripts/find.py --videos=/my/films --example=/my/films/a.mp4 --at=12.5 --run=runs/moving --top=50

Shots are compared by the features before the logits of a trained network of clips (--run: a work folder of
kronmesh train), or, without --run, by the colours of their middle frames. Files are cut into shots only once; the
work folder keeps the results. Files that cannot be decoded are left out and listed.
"""

from __future__ import annotations

import base64
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import flags

from kronmesh import files
from kronmesh.data import shown
from kronmesh.tasks.video import retrieval, trec
from kronmesh.train.errors import ConfigError
from kronmesh.train.reporting.charts import render
from kronmesh.train.runtime.workdir import storage_errors

VIDEOS = flags.DEFINE_string('videos', None, 'The folder that is searched, with all folders in it.', required=True)
EXAMPLE = flags.DEFINE_string('example', None, 'A video: what is looked for.', required=True)
AT = flags.DEFINE_float('at', -1.0, 'The second of the example whose shot is searched for; below 0: its longest shot.')
RUN = flags.DEFINE_string('run', '', 'Work folder of a finished run of a network of clips; empty: colours.')
TOP = flags.DEFINE_integer('top', 20, 'How many shots are shown.', lower_bound=1)
THRESHOLD = flags.DEFINE_float('threshold', 2.0, 'How many times the change of the frames around it makes a cut.', 1.0)
WORKDIR = launch.define_folder('workdir', 'runs/find', 'Folder for the library, the page and the run file.')


def chosen(path: Path, embedding: retrieval.Embedding) -> tuple[retrieval.Shot, retrieval.Vectors]:
  """Returns the shot of the example to search for, and its vector.

  Raises:
    ConfigError: the file does not exist, it ends before --at, or a flag is not finite.
  """
  if not path.is_file():
    raise ConfigError(f'--example={shown(path)}: {"no file" if path.exists() else "no such file"}')
  for flag in (AT, THRESHOLD):
    if not math.isfinite(flag.value):
      raise ConfigError(f'--{flag.name}={flag.value} must be a finite number')
  shots = list(retrieval.film_shots(path, embedding, THRESHOLD.value))
  if AT.value < 0:
    return max(shots, key=lambda pair: len(pair[0].frames))
  for shot, vector in shots:
    if shot.first <= AT.value * embedding.rate < shot.first + len(shot.frames):
      return shot, vector
  last = shots[-1][0]
  raise ConfigError(f'--at={AT.value:g}: {path} ends at {(last.first + len(last.frames)) / embedding.rate:.1f} s')


def times(begins: float, ends: float) -> str:
  clock = lambda s: f'{int(s) // 60}:{s % 60:04.1f}'  # noqa: E731
  return f'{clock(begins)} to {clock(ends)}'


def is_example(entry: retrieval.Entry, span: tuple[float, float]) -> bool:
  """Returns whether a shot of the library is the example itself."""
  same = (Path(VIDEOS.value) / entry.film).resolve() == Path(EXAMPLE.value).resolve()
  return same and entry.begins < span[1] and span[0] < entry.ends


def find() -> None:
  workdir = Path(WORKDIR.value)
  for name in ('found.html', 'run.txt'):
    if (workdir / name).is_dir():
      raise ConfigError(f'{workdir / name} is a folder, where a file is to be written; choose another --workdir')
  with storage_errors(workdir):
    search(workdir)


def search(workdir: Path) -> None:
  start = time.time()
  if not Path(VIDEOS.value).is_dir():
    raise ConfigError(f'--videos={VIDEOS.value}: no such folder')
  try:
    (workdir / 'library').mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'--workdir={workdir}: {error.strerror}; choose another') from error
  embedding = retrieval.network(RUN.value) if RUN.value else retrieval.layout()
  shot, vector = chosen(Path(EXAMPLE.value), embedding)
  if not vector.any():
    raise ConfigError(
      f'--example={shown(EXAMPLE.value)}: its shot has one colour all over, which is like nothing; name another by --at, '
      'or compare by a network (--run)'
    )
  entries, skipped = retrieval.library(Path(VIDEOS.value), embedding, workdir / 'library', THRESHOLD.value)
  cosines, rows = retrieval.nearest(np.stack([e.vector for e in entries]), vector[None], TOP.value)
  found = [(float(c), entries[row]) for c, row in zip(cosines[0], rows[0], strict=True)]
  picture = lambda jpeg: 'data:image/jpeg;base64,' + base64.b64encode(jpeg).decode()  # noqa: E731
  span = (shot.first / embedding.rate, (shot.first + len(shot.frames)) / embedding.rate)
  hits = [(c, entry) for c, entry in found if c > 0 and not is_example(entry, span)]
  some = [shot.frames[i] for i in (len(shot.frames) // 4, len(shot.frames) // 2, 3 * len(shot.frames) // 4)]
  page = render(
    'find.html',
    title=f'Shots like {shown(Path(EXAMPLE.value).name)}',
    subtitle=f'by {embedding.name}, in {shown(VIDEOS.value)}',
    cards=[
      {'name': 'files', 'value': f'{len({e.film for e in entries}):,}'},
      {'name': 'shots', 'value': f'{len(entries):,}'},
      {'name': 'files left out', 'value': f'{len(skipped):,}'},
      {'name': 'seconds', 'value': f'{time.time() - start:.1f}'},
    ],
    example={
      'name': shown(EXAMPLE.value),
      'times': times(*span),
      'thumbs': [picture(retrieval.thumbnail(frame)) for frame in some],
    },
    shots=[
      {
        'rank': rank,
        'name': shown(entry.film),
        'times': times(entry.begins, entry.ends),
        'cosine': f'{cosine:.3f}',
        'thumbs': [picture(t) for t in entry.thumbs],
      }
      for rank, (cosine, entry) in enumerate(hits, 1)
    ],
    skipped=skipped,
  )
  files.write(workdir / 'found.html', page)
  names = {f'{entry.film}#{entry.begins:.1f}': cosine for cosine, entry in found}
  trec.write_run(workdir / 'run.txt', {'example': names}, 'kronmesh')
  for rank, (cosine, entry) in enumerate(hits[:10], 1):
    print(f'{rank:3}  {cosine:6.3f}  {shown(entry.film)}  {times(entry.begins, entry.ends)}')
  for words in skipped[:5]:
    print(f'left out: {words}')
  print(f'{len(entries)} shots of {len({e.film for e in entries})} files, {len(skipped)} files left out')
  print(f'page      {workdir / "found.html"}')
  print(f'run file  {workdir / "run.txt"}')


if __name__ == '__main__':
  launch.command(find, '--example=...')
