"""Sets of scenes by name, made on first use and kept as array_record."""

from __future__ import annotations

from pathlib import Path

from .builders import from_source, prepare
from .dashcam import Dashcam
from .datasets import data_dir
from .errors import DataError
from .scenes import SPLITS, Scenes, read
from .surveillance import VTEST_DEBIAN, Surveillance

SCENES = {'dashcam': Dashcam, 'surveillance': Surveillance}
"""Maps the name of each set of scenes to its builder; `load_scenes` loads them."""


def load_scenes(name: str, split: str, *, folder: str = '', source: str = '') -> Scenes:
  """Loads a split of a set of scenes; a set that is not prepared yet is prepared first.

  Args:
    name: 'dashcam' or 'surveillance'.
    split: 'train', 'validation' or 'test'.
    folder: where prepared data is kept; see `data_dir`.
    source: for 'surveillance', the film vtest.avi; by default that of Debian's opencv-doc.

  Returns:
    A `Scenes`.

  Raises:
    DataError: the name or split is unknown, or the film is missing or is another one.
  """
  if name not in SCENES:
    raise DataError(f'set of scenes {name!r} is unknown; choose from {", ".join(SCENES)}')
  if split not in SPLITS:
    raise DataError(f'split {split!r} is unknown; choose from {", ".join(SPLITS)}')
  settings = {'data_dir': data_dir(folder), 'file_format': 'array_record'}
  if name == 'surveillance':
    settings['source'] = source
  builder = SCENES[name](**settings)
  if name == 'surveillance':
    _from_film(builder, source)
  elif not Path(builder.data_path).is_dir():
    prepare(builder)
  return read(builder, split)


def _from_film(builder: Surveillance, source: str) -> None:
  film = builder.source
  if not film.is_file() and not Path(builder.data_path).is_dir():
    raise DataError(
      f'surveillance: no film {film}; install the Debian package opencv-doc ({VTEST_DEBIAN}), or name '
      'vtest.avi by --config.data.source'
    )
  there = [('film', film)] if film.is_file() else None
  from_source(builder, 'surveillance', film if source or there else '', there)
