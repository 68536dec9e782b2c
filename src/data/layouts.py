"""Folders of videos as their authors hand them out: which files there are, in which split, of which class.

Nothing is downloaded; `root` is the user's own copy. Spans are seconds of the video in which what its class names happens,
where the set says so.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .datasets import DataError

ENDINGS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.ogv', '.webm', '.wmv')


class LayoutError(DataError):
  """A folder that is not laid out as its set is; one line that says what is missing."""


class Entry(NamedTuple):
  """A video of a set.

  spans: (start, end) in seconds, or in frames where `in_frames`.
  """

  path: Path
  split: str
  label: str
  spans: tuple[tuple[float, float], ...] = ()
  in_frames: bool = False


def video_folder(root: Path) -> list[Entry]:
  """Any videos, as `root/split/class/*.mp4`."""
  return [
    Entry(path, split.name, label.name)
    for split in _folders(root)
    for label in _folders(split)
    for path in sorted(label.iterdir())
    if path.suffix.lower() in ENDINGS
  ]


def ucf101(root: Path, fold: int = 1) -> list[Entry]:
  """UCF-101 (Soomro et al. 2012): `UCF-101/Class/v_Class_g01_c01.avi` and `ucfTrainTestlist/trainlist01.txt`."""
  videos = root / 'UCF-101' if (root / 'UCF-101').is_dir() else root
  lists = _one_of(root, 'ucfTrainTestlist', '.')
  entries = []
  for split, name in (('train', f'trainlist{fold:02}.txt'), ('test', f'testlist{fold:02}.txt')):
    for line in _lines(lists / name):
      relative = line.split()[0]
      entries.append(Entry(videos / relative, split, relative.split('/')[0]))
  return entries


def kinetics(root: Path) -> list[Entry]:
  """Kinetics (Kay et al. 2017), as `train/class/*.mp4`, or as `train/*.mp4` with `train.csv`, whose rows have label and id.

  Files are named by id, start and end: `-3B32lodo2M_000059_000069.mp4`. `val` or `validate` is the test split; rows of the
  csv whose video could not be downloaded are left out, as they are everywhere.
  """
  entries = []
  for split, names in (('train', ('train',)), ('test', ('val', 'validate', 'test'))):
    folder = next((root / n for n in names if (root / n).is_dir()), None)
    if folder is None:
      continue
    for label in _folders(folder):
      entries += [Entry(p, split, label.name.replace('_', ' ')) for p in sorted(label.iterdir()) if _is_video(p)]
    table = next(
      (p for n in names for p in (root / f'{n}.csv', root / 'annotations' / f'{n}.csv') if p.is_file()), None
    )
    if table is not None:
      files = {p.name[:11]: p for p in sorted(folder.iterdir()) if _is_video(p)}
      with open(table, newline='') as file:
        rows = [r for r in csv.DictReader(file) if r.get('youtube_id') in files]
      entries += [Entry(files[r['youtube_id']], split, r['label']) for r in rows]
  return entries


def ucf_crime(root: Path) -> list[Entry]:
  """UCF-Crime (Sultani et al. 2018): `Anomaly_Train.txt`, `Anomaly_Test.txt`, and the test set's temporal annotation.

  Lines of the lists are paths like `Abuse/Abuse001_x264.mp4`, which lie in the root or in folders like
  `Anomaly-Videos-Part-1`; those of the annotation `Abuse028_x264.mp4  Abuse  165  240  -1  -1`, in frames.
  """
  spans = {}
  for name in ('Temporal_Anomaly_Annotation_for_Testing_Videos.txt', 'Temporal_Anomaly_Annotation.txt'):
    for line in _lines(root / name) if (root / name).is_file() else []:
      video, _, *numbers = line.split()
      bounds = [float(x) for x in numbers]
      spans[video] = tuple((a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a >= 0)
  entries = []
  for split, name in (('train', 'Anomaly_Train.txt'), ('test', 'Anomaly_Test.txt')):
    for line in _lines(root / name):
      relative = Path(line)
      path = next((p for p in (root / relative, *root.glob(f'*/{relative}')) if p.is_file()), root / relative)
      label = 'Normal' if 'normal' in relative.parts[0].lower() else relative.parts[0]
      entries.append(Entry(path, split, label, spans.get(relative.name, ()), in_frames=True))
  return entries


def dad(root: Path) -> list[Entry]:
  """The Dashcam Accident Dataset (Chan et al. 2016): `videos/training/positive/000001.mp4`, 100 frames at 20 a second.

  An accident begins at the 90th frame of every positive one.
  """
  entries = []
  for split, folder in (('train', 'training'), ('test', 'testing')):
    for kind, label in (('negative', 'normal'), ('positive', 'accident')):
      files = _videos(_one_of(root, f'videos/{folder}/{kind}', f'{folder}/{kind}'))
      spans = ((90.0, 100.0),) if label == 'accident' else ()
      entries += [Entry(p, split, label, spans, in_frames=True) for p in files]
  return entries


def ccd(root: Path) -> list[Entry]:
  """The Car Crash Dataset (Bao et al. 2020): `videos/Normal`, `videos/Crash-1500` and `Crash-1500.txt`; 50 frames each.

  Lines of the text are `000001,[0, 0, ..., 1, 1],285,youtubeID,Day,Normal,Yes`; ones mark the accident's frames. Every
  fifth video is in the test split: the authors' own division comes with their features only.
  """
  notes = _one_of(root, 'Crash-1500.txt', 'videos/Crash-1500.txt', 'annotations/Crash-1500.txt')
  spans = {}
  for line in _lines(notes):
    found = re.match(r'(\w+),\s*\[([01,\s]*)\]', line)
    if not found:
      raise LayoutError(f'{notes}: {line[:40]!r} is not like "000001,[0, 1, ...],..."')
    marks = [int(x) for x in found[2].replace(' ', '').split(',') if x]
    spans[found[1]] = ((float(marks.index(1)), float(len(marks))),) if 1 in marks else ()
  entries = []
  for folder, label in (('Normal', 'normal'), ('Crash-1500', 'accident')):
    for i, path in enumerate(_videos(_one_of(root, f'videos/{folder}', folder))):
      own = spans.get(path.stem, ()) if label == 'accident' else ()
      entries.append(Entry(path, 'test' if i % 5 == 4 else 'train', label, own, in_frames=True))
  return entries


LAYOUTS: dict[str, Callable[[Path], list[Entry]]] = {
  'video_folder': video_folder,
  'ucf101': ucf101,
  'kinetics': kinetics,
  'ucf_crime': ucf_crime,
  'dad': dad,
  'ccd': ccd,
}


def find(name: str, root: str | Path) -> list[Entry]:
  """The videos of a set in the user's copy.

  Raises:
    LayoutError: an unknown name, no such folder, or nothing in it that is laid out so.
  """
  if name not in LAYOUTS:
    raise LayoutError(f'{name!r} is no layout of videos; choose from {", ".join(LAYOUTS)}')
  if not str(root) or not Path(root).is_dir():
    raise LayoutError(f'{name}: no folder {str(root)!r}; name your copy by --config.data.source')
  entries = LAYOUTS[name](Path(root))
  if not entries:
    words = LAYOUTS[name].__doc__.split('\n')[0]
    raise LayoutError(f'{name}: no videos in {root}; what is looked for: {words}')
  return entries


def _folders(root: Path) -> list[Path]:
  return sorted(p for p in root.iterdir() if p.is_dir())


def _is_video(path: Path) -> bool:
  return path.is_file() and path.suffix.lower() in ENDINGS


def _videos(folder: Path) -> list[Path]:
  return [p for p in sorted(folder.iterdir()) if _is_video(p)]


def _one_of(root: Path, *names: str) -> Path:
  for name in names:
    if (root / name).exists():
      return root / name
  raise LayoutError(f'{root}: no {" nor ".join(names)} in it')


def _lines(path: Path) -> Iterable[str]:
  if not path.is_file():
    raise LayoutError(f'{path} is missing')
  return [line.strip() for line in path.read_text(errors='replace').splitlines() if line.strip()]
