"""Writers of measurements: JSON lines, TensorBoard's event files and Weights & Biases."""

from __future__ import annotations

import importlib.util
import re
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from ... import files
from ..errors import ConfigError
from ..runtime.workdir import Rows, as_json

_NOT_SHOWN = ('held', 'finite_input', 'step')


def check(config: Any) -> None:
  """Raises ConfigError if the config asks for Weights & Biases, but it is not installed or the login fails."""
  if not config.writers.wandb:
    return
  if importlib.util.find_spec('wandb') is None:
    raise ConfigError('config.writers.wandb needs the package wandb: pip install wandb')
  import wandb

  try:
    wandb.login()
  except wandb.errors.UsageError as error:
    raise ConfigError(f'config.writers.wandb={config.writers.wandb!r}: {error} Or set WANDB_MODE=offline') from error


class Writers:
  """The writers of a run's metrics. Only the chief writes.

  All rows go to `metrics.jsonl`. The other writers get the last row of each kind.

  Args:
    config: a config whose section `writers` names the writers.
    workdir: the run's folder.
    step: the step from which the run goes on.
    check: a function that raises an error if the folder must no longer be written.
  """

  def __init__(self, config: Any, workdir: Path, step: int, chief: bool, check: Callable[[], None] = lambda: None):
    self.check, self.log = check, Rows(workdir / 'metrics.jsonl', chief)
    self.board = self.wandb = None
    if chief and config.writers.tensorboard:
      from tensorboardX import SummaryWriter  # event files without TensorFlow

      self.board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)
    if chief and config.writers.wandb:
      self.wandb = _wandb(config, workdir)

  def steps(self, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows of several steps."""
    self.check()
    rows = [{k: v for k, v in row.items() if np.ndim(v) == 0 and k not in _NOT_SHOWN[:2]} for row in rows]
    if rows:
      self.log.add(rows)
      self._show('train', rows[-1])

  def row(self, kind: str, row: dict[str, Any]) -> None:
    """Writes a row of another kind: 'eval', 'time' or 'layers'."""
    self.log.add([row])
    self._show(kind, row)

  def layers(self, step: int, layers: dict[str, dict[str, float]]) -> None:
    """Writes the numbers of layers to TensorBoard and Weights & Biases only; their rows are in a separate file."""
    flat = {f'{name}/{key}': value for name, numbers in layers.items() for key, value in numbers.items()}
    self._show('layers', {'step': step, **flat})

  def picture(self, step: int, image: UInt8[np.ndarray, 'h w c']) -> None:
    """Writes a picture that a run has made; `samples/` gets one after each evaluation."""
    if not self.log.chief:
      return
    where = self.log.path.parent / 'samples'
    where.mkdir(exist_ok=True)
    image = image[..., 0] if image.shape[-1] == 1 else image
    with files.replacing(where / f'{step:08}.png') as file:
      Image.fromarray(image).save(file, 'PNG')
    if self._shows():
      self.board.add_image('samples', image, step, dataformats='HWC' if image.ndim == 3 else 'HW')

  def _show(self, kind: str, row: dict[str, Any]) -> None:
    values = {f'{kind}/{k.removeprefix("eval_")}': v for k, v in row.items() if k not in _NOT_SHOWN}
    values = {k: float(v) for k, v in values.items() if isinstance(v, int | float | np.number)}
    if values and self._shows():  # one event for all takes a tenth of the time of one for each
      from tensorboardX.proto.summary_pb2 import Summary

      summary = Summary(value=[Summary.Value(tag=_tag(name), simple_value=value) for name, value in values.items()])
      self.board.file_writer.add_summary(summary, row['step'])
    if self.wandb is not None:
      self.wandb.log(values, step=row['step'])

  def _shows(self) -> bool:
    """Checks whether TensorBoard's files can still be written, and gives them up if not.

    Its thread ends at a full disk, and its queue would wait for the thread.
    """
    if self.board is not None and not _thread(self.board).is_alive():
      logging.warning('%s: TensorBoard files can no longer be written, and are given up', self.log.path.parent)
      self.board.file_writer.event_writer._event_queue.cancel_join_thread()  # it would wait at exit
      self.board = None
    return self.board is not None

  def __enter__(self) -> Writers:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._shows():
      self.board.close()
    if self.wandb is not None:
      self.wandb.finish(exit_code=0 if value is None else 1)


def _thread(board: Any) -> threading.Thread:
  return board.file_writer.event_writer._worker


def _tag(name: str) -> str:
  """Replaces the characters that TensorBoard does not allow in a tag."""
  return re.sub(r'[^\w/.-]', '_', name)


def _wandb(config: Any, workdir: Path) -> Any:
  import wandb

  # With a fixed id, the same run goes on at Weights & Biases when this folder's run is resumed.
  settings = {'id': f'{workdir.name}-{zlib.crc32(str(workdir).encode()):08x}', 'resume': 'allow', 'dir': str(workdir)}
  return wandb.init(project=config.writers.wandb, name=workdir.name, config=as_json(config), **settings)
