"""Sets of scenes by name, made on first use and kept as array_record."""

from __future__ import annotations

from pathlib import Path

from .builders import prepare
from .dashcam import Dashcam
from .datasets import DataError, data_dir
from .scenes import SPLITS, Scenes, read
from .surveillance import VTEST_DEBIAN, Surveillance

SCENES = {'dashcam': Dashcam, 'surveillance': Surveillance}


def load_scenes(name: str, split: str, *, folder: str = '', source: str = '') -> Scenes:
  """A split of a set of scenes.

  Args:
    name: 'dashcam' or 'surveillance'.
    split: 'train', 'validation' or 'test'.
    folder: where prepared data is kept, see `datasets.data_dir`.
    source: for 'surveillance': the film vtest.avi; that of Debian's opencv-doc by default.

  Raises:
    DataError: an unknown name or split, no film, or another one.
  """
  if name not in SCENES:
    raise DataError(f'set of scenes {name!r} is unknown; choose from {", ".join(SCENES)}')
  if split not in SPLITS:
    raise DataError(f'split {split!r} is unknown; choose from {", ".join(SPLITS)}')
  settings = {'data_dir': data_dir(folder), 'file_format': 'array_record'}
  if name == 'surveillance':
    settings['source'] = source
  builder = SCENES[name](**settings)
  if not Path(builder.data_path).is_dir():
    if name == 'surveillance' and not builder.source.is_file():
      raise DataError(
        f'surveillance: no film {builder.source}; install the Debian package opencv-doc ({VTEST_DEBIAN}), or name '
        'vtest.avi by --config.data.source'
      )
    prepare(builder)
  return read(builder, split)
