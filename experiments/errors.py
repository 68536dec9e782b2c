"""Errors that end a command in one line, and their exit codes."""

MISTAKE = 2  # the user's to mend
FAILED = 3  # a run that can be resumed
STOPPED = 4  # one of several processes, because another one stopped
AGAIN = 75  # saved and stopped before its end; the same command goes on (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130


class ConfigError(ValueError):
  """A config that cannot be run."""


class RunError(RuntimeError):
  """A run that went wrong, at a step that the message names."""


class Preempted(RunError):
  """A run that was told to stop, and has saved."""
