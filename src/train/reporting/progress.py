"""A progress bar on a terminal, or plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
  """A display of the last step's loss and accuracy, the examples per second and the time left."""

  def __init__(self, title: str, steps: int, start: int, batch_size: int, quiet: bool = False):
    self.title, self.steps, self.batch_size, self.quiet = title, steps, batch_size, quiet
    self.done, self.notes, self.printed = start, '', 0.0
    live = sys.stderr.isatty() and not quiet
    self.bar = tqdm(total=steps, initial=start, desc=title, unit='step', dynamic_ncols=True) if live else None

  def __enter__(self) -> Progress:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self.bar is not None:
      self.bar.close()

  def update(self, done: int, metrics: dict[str, float], rate: float | None) -> None:
    """Shows the progress. It is called whenever metrics have come back from the device.

    Args:
      done: the number of steps done.
      metrics: the metrics of the last step.
      rate: examples per second without compilation, once that is known.
    """
    shown = ' '.join(f'{k} {v:.4g}' for k, v in metrics.items() if k in ('loss', 'error', 'accuracy'))
    pace = f', {rate:,.0f} examples/s' if rate else ''
    if self.bar is not None:
      self.bar.update(done - self.done)
      self.bar.set_postfix_str(f'{shown}{pace}{self.notes}')
    elif not self.quiet and (time.perf_counter() - self.printed > 5 or done == self.steps):
      left = f', {(self.steps - done) * self.batch_size / rate:.0f} s left' if rate else ''
      print(f'{self.title}: step {done}/{self.steps} {shown}{pace}{left}', flush=True)
      self.printed = time.perf_counter()
    self.done = done

  def note(self, scores: dict[str, float]) -> None:
    """Shows these scores, from the latest evaluation, from now on."""
    self.notes = ', eval ' + ' '.join(f'{k} {v:.4g}' for k, v in scores.items())
