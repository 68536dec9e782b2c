"""Errors that end a command in one line, and their exit codes."""

MISTAKE = 2  # the user has to correct something
FAILED = 3  # the run failed and can be resumed
STOPPED = 4  # one of several processes ended because another one stopped
AGAIN = 75  # the run was saved and stopped early; the same command resumes it (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130


class ConfigError(ValueError):
  """Reports a config that cannot be run."""


class RunError(RuntimeError):
  """Reports a run that failed and can be resumed."""


class Diverged(RunError):
  """Reports a run whose optimiser went wrong: a loss or gradient that is not finite, or a spike.

  This is the only error that says something about the settings, so scripts that compare settings may record it.
  """


class StorageError(RunError):
  """Reports a run whose work folder could not be written; of several processes, one alone may raise this."""


class Stopped(RunError):
  """Reports a run that was told to stop."""


class Preempted(Stopped):
  """Reports a run that was told to stop and has saved its state."""


def is_common(error: BaseException | None) -> bool:
  """Returns whether all processes of a run raise the error `error` together."""
  return isinstance(error, RunError) and not isinstance(error, StorageError)
