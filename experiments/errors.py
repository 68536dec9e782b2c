"""Errors that end a command in one line: exit code 2 for the user's mistake, 3 for a run that failed."""


class ConfigError(ValueError):
  """A config that cannot be run."""


class RunError(RuntimeError):
  """A run that went wrong, at a step that the message names."""
