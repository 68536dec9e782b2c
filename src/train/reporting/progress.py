"""A progress bar on a terminal, or plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from types import TracebackType

from tqdm import tqdm

_LEAST = 3  # rates that must be known before the time left is estimated
_FIRST = 2  # rates that are left out, because the first ones include compilation
_BAR = '{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}'
_SHOWN = ('loss', 'error', 'accuracy')


class Progress:
  """A display of the training metrics, the latest evaluation, the examples per second and the time left.

  The time left follows from the median rate so far, so that a step that compiles does not change it.
  """

  def __init__(self, title: str, steps: int, start: int, batch_size: int, quiet: bool = False):
    self.title, self.steps, self.batch_size, self.quiet = title, steps, batch_size, quiet
    self.done, self.notes, self.printed = start, '', 0.0
    self.rates: list[float] = []
    live = sys.stderr.isatty() and not quiet
    self.bar = tqdm(total=steps, initial=start, desc=title, dynamic_ncols=True, bar_format=_BAR) if live else None

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
      metrics: the metrics of the last step's batch.
      rate: examples per second since the last call, if known.
    """
    self.rates += [rate] if rate else []
    words = f'{_named("training", metrics)}{self.notes}{self._pace(done)}'
    if self.bar is not None:
      self.bar.update(done - self.done)
      self.bar.set_postfix_str(words)
    elif not self.quiet and (time.perf_counter() - self.printed > 5 or done == self.steps):
      print(f'{self.title}: step {done}/{self.steps}, {words}', flush=True)
      self.printed = time.perf_counter()
    self.done = done

  def note(self, scores: dict[str, float]) -> None:
    """Shows these scores, from the latest evaluation, from now on."""
    self.notes = f'; {_named("evaluation", scores)}'

  def _pace(self, done: int) -> str:
    if len(self.rates) < _FIRST + _LEAST:
      return ''
    rate = statistics.median(self.rates[_FIRST:])
    left = (self.steps - done) * self.batch_size / rate
    return f'; {rate:,.0f} examples/s' + (f', about {left:.0f} s left' if done < self.steps else '')


def _named(kind: str, metrics: dict[str, float]) -> str:
  """Names metrics by the data that they were computed on: 'training loss 0.5, accuracy 0.9'."""
  return f'{kind} ' + ', '.join(f'{k} {v:.4g}' for k, v in metrics.items() if k in _SHOWN or kind == 'evaluation')
