"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
  """Loss and accuracy of the last step, examples per second and the time left."""

  def __init__(self, title: str, steps: int, start: int, batch_size: int, quiet: bool = False):
    self.title, self.steps, self.batch_size, self.quiet = title, steps, batch_size, quiet
    self.done, self.began, self.notes = start, time.perf_counter(), ''
    self.first, self.rejected = start, {}
    live = sys.stderr.isatty() and not quiet
    self.bar = tqdm(total=steps, initial=start, desc=title, unit='step', dynamic_ncols=True) if live else None
    self.printed = 0.0

  def __enter__(self) -> Progress:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self.bar is not None:
      self.bar.close()

  def update(self, done: int, metrics: dict[str, float]) -> None:
    """Called whenever metrics have come back from the device."""
    seconds = time.perf_counter() - self.began
    rate = (done - self.first) * self.batch_size / max(seconds, 1e-9)
    shown = ' '.join(f'{k} {v:.4g}' for k, v in metrics.items() if k in ('loss', 'error', 'accuracy'))
    if self.bar is not None:
      self.bar.update(done - self.done)
      self.bar.set_postfix_str(f'{shown}, {rate:,.0f} examples/s{self.notes}')
    elif not self.quiet and (time.perf_counter() - self.printed > 5 or done == self.steps):
      left = seconds / max(done - self.first, 1) * (self.steps - done)
      print(f'{self.title}: step {done}/{self.steps} {shown}, {rate:,.0f} examples/s, {left:.0f} s left', flush=True)
      self.printed = time.perf_counter()
    self.done = done

  def warn_of_rejected(self, metrics: dict[str, float]) -> None:
    """Says so when K-FAC has dropped matrices since the last time."""
    rejected = {
      name: n for name, n in metrics.items() if name.startswith('rejected_') and n > self.rejected.get(name, 0)
    }
    if rejected:
      counts = ', '.join(f'{n:.0f} {name.removeprefix("rejected_")}' for name, n in rejected.items())
      tqdm.write(f'warning: {self.title}: so far {counts} were not finite and were dropped', file=sys.stderr)
    self.rejected |= rejected

  def note(self, scores: dict[str, float]) -> None:
    """The latest evaluation, shown from now on."""
    self.notes = ', eval ' + ' '.join(f'{k} {v:.4g}' for k, v in scores.items())
