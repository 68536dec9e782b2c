"""Schedules statistics and inverses: intervals grow during a run, and inverses are spread over an interval's steps."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..errors import CurvatureError
from .stacks import Layout

Interval = int | Array | Callable[[Any], Any]  # in steps, or a function of the step


def growing(every: int) -> Callable[[Any], Any]:
  """Returns an interval that grows from 1 to at most `every` steps.

  The interval is the largest power of two up to a sixteenth of the steps so far: 1 up to step 31, 2 up to step 63, 4 up
  to step 127. Curvature changes fastest at the start, and averages of few statistics are noisy. Whatever is refreshed
  at this interval is never older than about an eighth of the run.

  Args:
    every: the longest interval, in steps.

  Returns:
    A function of the step, a Python int or a traced one.

  Raises:
    CurvatureError: `every` is below 1.
  """
  if every < 1:
    raise CurvatureError(f'an interval of {every} steps; it must be at least 1')

  def interval(step: int | Int[Array, '']) -> Any:
    if isinstance(step, int | np.integer):
      step = int(step)
      return min(every, 1 << max(step // 16, 1).bit_length() - 1)
    young = jnp.maximum(jnp.asarray(step, jnp.int32) // 16, 1)
    return jnp.minimum(every, jnp.left_shift(1, 31 - jax.lax.clz(young)))

  return interval


def at(value: Any, step: Any) -> Any:
  """Returns a hyper-parameter or an interval at a step: the schedule's value, or the number itself."""
  return value(step) if callable(value) else value


def is_due(step: Any, every: Interval) -> Any:
  """Returns whether the step is due, as a static True if the interval is the number 1.

  The device decides it for a traced interval (inject_hyperparams).
  """
  return True if isinstance(every, int) and every == 1 else step % at(every, step) == 0


class Unit(NamedTuple):
  """Describes a run of slots that is inverted at once, the same slots for each owner.

  Attributes:
    stack: the name of the stack.
    first: the first slot of the run.
    width: the number of slots.
    at: the step among `every` at which the run is due.
    every: the number of steps in which all runs are due once.
    work: n^3 for each inverse of one owner.
  """

  stack: str
  first: int
  width: int
  at: int
  every: int
  work: int

  def due(self, step: int, interval: int) -> bool:
    """Checks whether the run is due at `step`, if all runs are due once in `interval` steps, at most `every`."""
    return step % interval == self.at * interval // self.every


def deal_units(layout: Layout, every: int, statistics_every: int = 1) -> tuple[Unit, ...]:
  """Spreads the inverses of a layout over `every` steps, so that each step gets at most its share, or one matrix.

  Small matrices are inverted together, up to a step's share. If `statistics_every` divides `every`, the steps that take
  statistics get no inverses. Inverses are dealt to steps by the longest-processing-time rule. Neighbouring steps are
  far apart in the order of the deal, so that shorter intervals, which merge neighbours, are balanced too.

  Args:
    layout: from `lay_out`.
    every: the number of steps in which every inverse is renewed once.
    statistics_every: the number of steps between two uses of statistics.

  Returns:
    The runs of slots that are inverted at once; together they cover every slot of every stack.
  """
  apart = statistics_every > 1 and every % statistics_every == 0
  steps = [s for s in _scattered(every) if not (apart and s % statistics_every == 0)]
  work = {name: stack.rows * stack.n**2 for name, stack in layout.stacks.items()}
  share = sum(stack.slots * work[name] for name, stack in layout.stacks.items()) / len(steps)
  runs = []
  for name, stack in layout.stacks.items():
    count = math.ceil(stack.slots / min(max(share // work[name], 1), stack.slots))
    width = math.ceil(stack.slots / count)
    runs += [(width * work[name], name, first, width) for first in range(0, stack.slots, width)]
  loads = [(0, order, step) for order, step in enumerate(steps)]
  units = []
  for cost, name, first, width in sorted(runs, key=lambda run: (-run[0], run[1:])):
    load, order, step = heapq.heappop(loads)
    units.append(Unit(name, first, width, step, every, cost))
    heapq.heappush(loads, (load + cost, order, step))
  return tuple(units)


def _scattered(n: int) -> list[int]:
  """Returns 0 to n - 1 in bit-reversed order, so that every prefix is spread over all of them (van der Corput)."""
  bits = max(n - 1, 1).bit_length()
  return [i for i in (int(f'{k:0{bits}b}'[::-1], 2) for k in range(2**bits)) if i < n]
