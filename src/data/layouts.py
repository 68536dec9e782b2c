"""Folders of videos as their authors distribute them: which files there are, in which split and of which class.

Nothing is downloaded; `root` is the user's copy. Spans say when the thing that a video's class names happens, in
seconds, where the set says so.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import logging

from .errors import DataError
from .folders import LeftOut, class_name, files_below, is_passed_over, listed, loose_files, shown, subfolders
from .text import read_lines, read_table
from .video import ENDINGS


class LayoutError(DataError):
  """The error for a folder that is not laid out as its set is; one line says what is missing."""


class Entry(NamedTuple):
  """A video of a set.

  spans: (start, end) in seconds, or in frames where `in_frames`.
  """

  path: Path
  split: str
  label: str
  spans: tuple[tuple[float, float], ...] = ()
  in_frames: bool = False


class Found(NamedTuple):
  """The content of a folder: the videos of the set, and the files that are left out."""

  entries: list[Entry]
  left_out: list[LeftOut]


def video_folder(root: Path) -> Found:
  """Any videos, as `root/split/class/*.mp4`, with any folders below a class."""
  layout = Found([], loose_files(root, 'in no folder of a split'))
  for split in subfolders(root):
    layout.left_out.extend(loose_files(split, 'in no folder of a class'))
    for label in subfolders(split):
      files = files_below(label, ENDINGS)
      layout.entries.extend(Entry(path, split.name, class_name(label)) for path in files.used)
      layout.left_out.extend(files.left_out)
  return layout


def ucf101(root: Path, fold: int = 1) -> Found:
  """UCF-101 (Soomro et al. 2012): `UCF-101/Class/v_Class_g01_c01.avi` and `ucfTrainTestlist/trainlist01.txt`."""
  videos = root / 'UCF-101' if (root / 'UCF-101').is_dir() else root
  lists = _one_of(root, 'ucfTrainTestlist', '.')
  entries = []
  for split, name in (('train', f'trainlist{fold:02}.txt'), ('test', f'testlist{fold:02}.txt')):
    for line in _lines(lists / name):
      relative = re.sub(r'\s+\d+$', '', line).replace(
        '\\', '/'
      )  # drops the number of the class; a name may have spaces
      entries.append(Entry(videos / relative, split, relative.split('/')[0]))
  return Found(entries, [])


def kinetics(root: Path) -> Found:
  """Kinetics (Kay et al. 2017), as `train/class/*.mp4`, or as `train/*.mp4` with `train.csv`: label, id, start and end.

  Files are named by id, start and end: `-3B32lodo2M_000059_000069.mp4`; one id may have several spans. The test split
  may be called `val` or `validate`. Rows of the csv whose video could not be downloaded are left out, as is usual.
  """
  layout = Found([], [])
  for split, names in (('train', ('train',)), ('test', ('val', 'validate', 'test'))):
    folder = next((root / n for n in names if (root / n).is_dir()), None)
    if folder is None:
      continue
    for label in subfolders(folder):
      files = files_below(label, ENDINGS)
      layout.entries.extend(Entry(p, split, class_name(label).replace('_', ' ')) for p in files.used)
      layout.left_out.extend(files.left_out)
    table = next(
      (p for n in names for p in (root / f'{n}.csv', root / 'annotations' / f'{n}.csv') if p.is_file()), None
    )
    if table is not None:
      entries = _of_table(table, folder, split)
      layout.entries.extend(entries.entries)
      layout.left_out.extend(entries.left_out)
  return layout


def _of_table(table: Path, folder: Path, split: str) -> Found:
  """Returns the videos in a folder that a table of Kinetics has rows for; the others are left out."""
  rows = read_table(table)
  lacking = {'label', 'youtube_id'} - set(rows[0] if rows else ())
  if lacking:
    raise LayoutError(f'{shown(table)}: its first line has no column {listed(sorted(lacking))}')
  spans = collections.Counter(row['youtube_id'] for row in rows)
  files: dict[tuple[str | int, ...], Path] = {}
  same: list[LeftOut] = []
  for path in _videos(folder):
    first = files.setdefault(_of_name(path.stem), path)
    if first != path:
      same.append(LeftOut(path, 'another file of the same clip'))
  entries: dict[Path, Entry] = {}
  for row in rows:
    video = row['youtube_id']
    exact, bare = (video, *_span(row)), (video,)  # a file named by the id alone fits if the id has one row
    path = files.get(exact) or (files.get(bare) if spans[video] == 1 else None)
    if path is None:
      continue
    entry = entries.setdefault(path, Entry(path, split, row['label']))
    if entry.label != row['label']:
      raise LayoutError(
        f'{shown(table)}: {path.name} has the labels {entry.label!r} and {row["label"]!r}; leave one out'
      )
  left = [LeftOut(p, f'in no row of {table.name}') for p in files.values() if p not in entries]
  return Found(list(entries.values()), left + same)


def _of_name(stem: str) -> tuple[str | int, ...]:
  """Returns (id, start, end) from the name of a file, or the name alone."""
  match = re.fullmatch(r'(.+)_(\d+)_(\d+)', stem)
  return (match[1], int(match[2]), int(match[3])) if match else (stem,)


def _span(row: dict[str, str]) -> tuple[int, ...]:
  """Returns where the video of a row begins and ends; nothing if the table does not say."""
  try:
    return tuple(round(float(row[key])) for key in ('time_start', 'time_end'))
  except (KeyError, TypeError, ValueError):
    return ()


def ucf_crime(root: Path) -> Found:
  """UCF-Crime (Sultani et al. 2018): `Anomaly_Train.txt`, `Anomaly_Test.txt`, and the test set's temporal annotation.

  Lines of the lists are paths like `Abuse/Abuse001_x264.mp4`, in the root or in folders like `Anomaly-Videos-Part-1`.
  Lines of the annotation are like `Abuse028_x264.mp4  Abuse  165  240  -1  -1`, in frames.
  """
  spans: dict[str, tuple[tuple[float, float], ...]] = {}
  for name in ('Temporal_Anomaly_Annotation_for_Testing_Videos.txt', 'Temporal_Anomaly_Annotation.txt'):
    if (root / name).is_file():
      spans |= _annotation(root / name)
  entries = []
  for split, name in (('train', 'Anomaly_Train.txt'), ('test', 'Anomaly_Test.txt')):
    for line in _lines(root / name):
      relative = Path(line.replace('\\', '/'))
      path = next((p for p in (root / relative, *root.glob(f'*/{relative}')) if p.is_file()), root / relative)
      label = 'Normal' if 'normal' in relative.parts[0].lower() else relative.parts[0]
      entries.append(Entry(path, split, label, spans.get(relative.name, ()), in_frames=True))
  strange = sorted(spans.keys() - {e.path.name for e in entries})
  if strange and len(strange) == len(spans):
    raise LayoutError(
      f'{shown(root)}: no film of the lists is called like one of the annotation, such as {strange[0]!r}'
    )
  if strange:
    logging.warning('%s: the annotation has films that no list has: %s', shown(root), listed(strange))
  return Found(entries, [])


def _annotation(path: Path) -> dict[str, tuple[tuple[float, float], ...]]:
  """Reads the spans of each film, in frames, from a temporal annotation of UCF-Crime; -1 stands for none."""
  spans = {}
  for number, line in read_lines(path):
    match = re.fullmatch(r'(.+?)\s+([A-Za-z]\S*)((?:\s+-?\d+(?:\.\d+)?)+)', line.strip())
    bounds = [float(x) for x in match[3].split()] if match else []
    if not match or len(bounds) % 2:
      raise LayoutError(
        f'{shown(path)}, line {number}: {line.strip()[:60]!r} is not a name, a class and pairs of frames, such as '
        '"Abuse028_x264.mp4  Abuse  165  240  -1  -1"'
      )
    spans[match[1]] = tuple((a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a >= 0)
  return spans


def dad(root: Path) -> Found:
  """The Dashcam Accident Dataset (Chan et al. 2016): `videos/training/positive/000001.mp4`, 100 frames at 20 a second.

  An accident begins at the 90th frame of every positive video.
  """
  entries = []
  for split, folder in (('train', 'training'), ('test', 'testing')):
    for kind, label in (('negative', 'normal'), ('positive', 'accident')):
      files = _videos(_one_of(root, f'videos/{folder}/{kind}', f'{folder}/{kind}'))
      spans = ((90.0, 100.0),) if label == 'accident' else ()
      entries += [Entry(p, split, label, spans, in_frames=True) for p in files]
  return Found(entries, [])


def ccd(root: Path) -> Found:
  """The Car Crash Dataset (Bao et al. 2020): `videos/Normal`, `videos/Crash-1500` and `Crash-1500.txt`; 50 frames each.

  Lines of the text are `000001,[0, 0, ..., 1, 1],285,youtubeID,Day,Normal,Yes`; ones mark the accident's frames. Every
  fifth video is in the test split, because the authors' division comes only with their features.
  """
  notes = _one_of(root, 'Crash-1500.txt', 'videos/Crash-1500.txt', 'annotations/Crash-1500.txt')
  spans = {}
  for line in _lines(notes):
    match = re.match(r'(\w+),\s*\[([01,\s]*)\]', line)
    if not match:
      raise LayoutError(f'{notes}: {line[:40]!r} is not like "000001,[0, 1, ...],..."')
    marks = [int(x) for x in match[2].replace(' ', '').split(',') if x]
    spans[match[1]] = ((float(marks.index(1)), float(len(marks))),) if 1 in marks else ()
  entries = []
  for folder, label in (('Normal', 'normal'), ('Crash-1500', 'accident')):
    for i, path in enumerate(_videos(_one_of(root, f'videos/{folder}', folder))):
      times = spans.get(path.stem, ()) if label == 'accident' else ()
      entries.append(Entry(path, 'test' if i % 5 == 4 else 'train', label, times, in_frames=True))
  return Found(entries, [])


LAYOUTS: dict[str, Callable[[Path], Found]] = {
  'video_folder': video_folder,
  'ucf101': ucf101,
  'kinetics': kinetics,
  'ucf_crime': ucf_crime,
  'dad': dad,
  'ccd': ccd,
}
"""Maps the name of each layout of videos to the function that finds the videos in a folder.

Each function takes the folder and returns a named tuple of `entries` (path, split, label, spans, and whether the
spans are in frames, not seconds) and `left_out` (the files that are not used, with the reason).
"""


def look(name: str, root: str | Path) -> Found:
  """Returns the videos of a set in the user's copy, and the files that are left out.

  Raises:
    LayoutError: the name is unknown, there is no such folder, nothing in it has the layout, a file is listed twice, or
      another split has a class that train lacks.
  """
  if name not in LAYOUTS:
    raise LayoutError(f'{name!r} is not a layout of videos; choose from {", ".join(LAYOUTS)}')
  if not str(root) or not Path(root).is_dir():
    raise LayoutError(f'{name}: no folder {shown(root)!r}; name your copy by --config.data.source')
  layout = LAYOUTS[name](Path(root))
  if not layout.entries:
    words = LAYOUTS[name].__doc__.split('\n')[0]
    raise LayoutError(f'{name}: no videos in {shown(root)}; what is looked for: {words}')
  twice = [e for e, count in collections.Counter((e.split, e.path) for e in layout.entries).items() if count > 1]
  if twice:
    raise LayoutError(f'{name}: {shown(twice[0][1])} is in the split {twice[0][0]} twice; leave one out')
  known = {e.label for e in layout.entries if e.split == 'train'}
  for split in sorted({e.split for e in layout.entries} - {'train'}) if known else ():
    labels = {e.label for e in layout.entries if e.split == split}
    if labels - known:
      raise LayoutError(f'{name}: the split {split} has the class {listed(sorted(labels - known))}, which train lacks')
    if known - labels:
      logging.warning('%s: the split %s has no video of the class %s', name, split, listed(sorted(known - labels)))
  return layout


def find(name: str, root: str | Path) -> list[Entry]:
  """Returns only the videos of a set in the user's copy; raises what `look` does."""
  return look(name, root).entries


def _videos(folder: Path) -> list[Path]:
  files = (p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not is_passed_over(p.name))
  return sorted(p for p in files if p.is_file())


def _one_of(root: Path, *names: str) -> Path:
  for name in names:
    if (root / name).exists():
      return root / name
  raise LayoutError(f'{shown(root)}: no {" nor ".join(names)} in it')


def _lines(path: Path) -> list[str]:
  if not path.is_file():
    raise LayoutError(f'{shown(path)} is missing')
  return [line.strip() for _, line in read_lines(path)]
