"""The objects that watch a run while it trains, passed on together."""

from __future__ import annotations

from typing import NamedTuple

from .checkpoints import Saver
from .reporting.writers import Writers
from .runtime.profile import Profile
from .runtime.watchdog import Watchdog
from .runtime.workdir import Events


class Watchers(NamedTuple):
  """The watchers of a run in training. quiet: whether to hide the progress."""

  saver: Saver
  writers: Writers
  events: Events
  tracing: Profile
  watchdog: Watchdog
  quiet: bool
