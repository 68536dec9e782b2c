"""What is measured, to whoever wants to see it: JSON lines, TensorBoard's event files, Weights & Biases."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments import folder
from experiments.errors import ConfigError
from kronmesh import files

_NOT_SHOWN = ('held', 'finite_input', 'step')


def check(config: Any) -> None:
  """Raises ConfigError if Weights & Biases is asked for and not installed, or does not know the user."""
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
  """Writes rows of metrics: all to `metrics.jsonl`, the last of each kind to the others. Only the chief's writes.

  Args:
    config: its section `writers` says which.
    workdir: the run's folder.
    step: where the run goes on.
    check: raises an error where the folder may not be written any more.
  """

  def __init__(self, config: Any, workdir: Path, step: int, chief: bool, check: Callable[[], None] = lambda: None):
    self.check, self.log = check, folder.Rows(workdir / 'metrics.jsonl', chief)
    self.board = self.wandb = None
    if chief and config.writers.tensorboard:
      from tensorboardX import SummaryWriter  # event files without TensorFlow

      self.board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)
    if chief and config.writers.wandb:
      self.wandb = _wandb(config, workdir)

  def steps(self, rows: Sequence[dict[str, Any]]) -> None:
    """Of several steps."""
    self.check()
    rows = [{k: v for k, v in row.items() if np.ndim(v) == 0 and k not in _NOT_SHOWN[:2]} for row in rows]
    if rows:
      self.log.add(rows)
      self._show('train', rows[-1])

  def row(self, kind: str, row: dict[str, Any]) -> None:
    """One of another kind: 'eval', 'time', 'layers'."""
    self.log.add([row])
    self._show(kind, row)

  def layers(self, step: int, layers: dict[str, dict[str, float]]) -> None:
    """Numbers of layers, to the others alone; they have a file of their own."""
    flat = {f'{name}/{key}': value for name, numbers in layers.items() for key, value in numbers.items()}
    self._show('layers', {'step': step, **flat})

  def picture(self, step: int, image: UInt8[np.ndarray, 'h w c']) -> None:
    """What a run makes: `samples/` has one after each evaluation."""
    if not self.log.chief:
      return
    where = self.log.path.parent / 'samples'
    where.mkdir(exist_ok=True)
    image = image[..., 0] if image.shape[-1] == 1 else image
    with files.replacing(where / f'{step:08}.png') as file:
      Image.fromarray(image).save(file, 'PNG')
    if self.board is not None:
      self.board.add_image('samples', image, step, dataformats='HWC' if image.ndim == 3 else 'HW')

  def _show(self, kind: str, row: dict[str, Any]) -> None:
    values = {f'{kind}/{k.removeprefix("eval_")}': v for k, v in row.items() if k not in _NOT_SHOWN}
    values = {k: float(v) for k, v in values.items() if isinstance(v, int | float | np.number)}
    if self.board is not None and values:  # one event, for a tenth of the time of one for each
      from tensorboardX.proto.summary_pb2 import Summary

      summary = Summary(value=[Summary.Value(tag=_tag(name), simple_value=value) for name, value in values.items()])
      self.board.file_writer.add_summary(summary, row['step'])
    if self.wandb is not None:
      self.wandb.log(values, step=row['step'])

  def __enter__(self) -> Writers:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self.board is not None:
      self.board.close()
    if self.wandb is not None:
      self.wandb.finish(exit_code=0 if value is None else 1)


def _tag(name: str) -> str:
  """TensorBoard's own characters."""
  return re.sub(r'[^\w/.-]', '_', name)


def _wandb(config: Any, workdir: Path) -> Any:
  import wandb

  # The same run goes on where this folder's does.
  own = {'id': f'{workdir.name}-{zlib.crc32(str(workdir).encode()):08x}', 'resume': 'allow', 'dir': str(workdir)}
  return wandb.init(project=config.writers.wandb, name=workdir.name, config=folder.as_json(config), **own)
