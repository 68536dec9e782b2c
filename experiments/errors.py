"""Errors that end a command in one line, and their exit codes."""

MISTAKE = 2  # the user's to mend
FAILED = 3  # a run that can be resumed
STOPPED = 4  # one of several processes, because another one stopped
AGAIN = 75  # saved and stopped before its end; the same command goes on (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130


class ConfigError(ValueError):
  """A config that cannot be run."""


class RunError(RuntimeError):
  """A run that went wrong; it can be resumed."""


class Diverged(RunError):
  """A run whose optimiser went wrong: a loss or gradient that is not finite, or a spike.

  Of all errors this one alone says something of the settings, so that scripts that compare settings may record it.
  """


class StorageError(RunError):
  """A run whose work folder could not be written; of several processes it may be one alone."""


class Stopped(RunError):
  """A run that was told to stop."""


class Preempted(Stopped):
  """A run that was told to stop, and has saved."""


def is_common(error: BaseException | None) -> bool:
  """Returns whether all processes of a run raise this error together."""
  return isinstance(error, RunError) and not isinstance(error, StorageError)
