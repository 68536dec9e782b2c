"""The error for networks, files and tools that `edge` cannot use."""


class EdgeError(ValueError):
  """Reports a network, a file or a tool that cannot be used; one line says what, where, and what to change."""
