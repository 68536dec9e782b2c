"""The error for data that cannot be used."""


class DataError(ValueError):
  """Reports data that are missing or cannot be used; one line says what, where, and what to change."""
