"""Pictures in folders of classes, as a random-access source of examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import logging

from .errors import DataError
from .folders import LeftOut, class_name, files_below, listed, loose_files, shown, subfolders
from .limits import read_file
from .pictures import ENDINGS


class ImageFolder:
  """Reads pictures in `folder/split/class/*.jpg`, or in any folders below a class, as a sequence of examples.

  An example is {'image': the encoded picture, 'label': the number of its class}.

  Args:
    folder: the folder with the splits.
    split: the name of the split's folder.

  Attributes:
    names: names of the classes: train's folders in order, or the split's own if there is no train. They number the
      labels of every split.
    classes: number of classes.
    files: (path, label) of every picture.
    left_out: the files that are not pictures.
    labelled: True, because folders are classes.

  Raises:
    DataError: there are no pictures, a class of train has none, or another split has a class that train lacks.
  """

  labelled = True

  def __init__(self, folder: str | Path, split: str):
    root = Path(folder)
    if not (root / split).is_dir():
      raise DataError(_nothing(root / split, split))
    self.left_out: list[LeftOut] = loose_files(root / split, 'in no folder of a class')
    by_class: dict[str, list[Path]] = {}
    for subfolder in subfolders(root / split):
      files = files_below(subfolder, ENDINGS)
      by_class.setdefault(class_name(subfolder), []).extend(files.used)
      self.left_out += files.left_out
    empty = sorted(name for name, files in by_class.items() if not files)
    if len(empty) == len(by_class):
      raise DataError(_nothing(root / split, split))
    if split == 'train' or not (root / 'train').is_dir():
      self.names = sorted(by_class)
      if empty:
        raise DataError(
          f'{shown(root / split)}: no picture in the folder of class {listed(empty)}; fill it, or remove it'
        )
    else:
      self.names = sorted({class_name(folder) for folder in subfolders(root / 'train')})
      strange = sorted({name for name, files in by_class.items() if files} - set(self.names))
      if strange:
        raise DataError(
          f'{shown(root / split)}: train has no class {listed(strange)}, only {listed(self.names)}; rename or move it'
        )
      lacking = [name for name in self.names if not by_class.get(name)]
      if lacking:
        logging.warning('%s: no pictures of class %s', shown(root / split), listed(lacking))
    self.classes = len(self.names)
    number = {name: label for label, name in enumerate(self.names)}
    self.files = [(path, number[name]) for name in self.names for path in by_class.get(name, ())]

  def name_of(self, index: int) -> str:
    """Returns the path of the picture at `index`, for messages."""
    return shown(self.files[index][0])

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path, label = self.files[index]
    return {'image': read_file(path), 'label': label}


def _nothing(where: Path, split: str) -> str:
  return f'no images in {shown(where)}/CLASS/; name a folder with {split}/CLASS/*.jpg by --config.data.folder'
